"""Tables show names as users gave them, and no column that is empty."""

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType

from gcvit_edge.measurement.parity import Parity
from gcvit_edge.measurement.result import Accuracy, Report, Result, Run
from gcvit_edge.report.analysis import analysis_tables
from gcvit_edge.report.devices import accuracy_table, benchmark_table
from gcvit_edge.report.table import limit_warnings, results_table, timing_table

NAMES = ("pi [lab]", "pi[/dev/ttyUSB0]", "[red]")


def shown(renderable: RenderableType, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, emoji=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def report(*precisions: str, compared: bool, names: Sequence[str] = NAMES, error: str | None = "it is off") -> Report:
    """Of devices that all failed in the end. compared: with a float artifact."""

    def result(precision: str) -> Result:
        of_drop = {
            "drop_points": 0.5, "drop_ci95": (0.1, 0.9), "agreement": 0.99, "agreement_ci95": (0.98, 0.995), "sqnr_db": 30.0,
            "sqnr_ci95": (29, 31),
        }  # fmt: skip
        accuracy = Accuracy(images=40, top1=0.9, top1_ci95=(0.8, 0.95), top5=1, **(of_drop if compared and precision != "float" else {}))
        return Result(
            backend="executorch", precision=precision, execution="cpu", runtime="r", runtime_version="1", threads=1, files={"m": 1000},
            load_ms=1, peak_rss_mb=1, runtime_rss_mb=1, parity=Parity(sqnr_db=90, minimum_db=20, same_top1=1, passed=True),
            accuracy=accuracy, energy_j={"VDD[5V]": 0.1},
        )  # fmt: skip

    ran = [
        Run(device=name, target="ssh", emulated=False, machine=None, results=tuple(map(result, precisions)), error=error) for name in names
    ]
    return Report(gcvit_edge="0", finished="now", model="m[x]", mode="evaluate", runs=tuple(ran))


def test_device_names_are_shown_as_they_are() -> None:
    for table in (accuracy_table(report("int8", compared=True)), benchmark_table(report("int8", compared=True))):
        text = shown(table)
        assert all(text.count(f"{name} ") == 2 for name in NAMES), text  # a result, and the failure
        assert "m[x], " in text
    assert "VDD[5V] 0.1" in text


def test_class_names_are_shown_as_they_are() -> None:
    drift = {"images": 10, "float_top1": 1, "int8_top1": 1, "lost": 0, "won": 0, "drop_points": 0, "drop_ci95": (0, 0), "sqnr_db": 30}
    names = ("[red]", "red [dotted]", "a[/b]", ":cat: c")
    logits = {"simulated_db": 1, "deployed_db": 1, "deployed_to_simulated_db": 1, "with_taps_to_without_db": 1}
    entry = {
        "backend": "onnx", "layers": [], "all_rounded_db": 31.25, "logits": logits, "int8_ms": 1, "plain_ms": 1, "float_ms": 1,
        "precision": "int8",
        "pareto": {"order": [], "frontier": [(0, 1, 1)]},
        "drift": {"all": drift, "classes": [drift | {"class": name} for name in names]},
    }  # fmt: skip
    tables = analysis_tables({"images": {"sensitivity": 1}, "backends": [entry], "activations": []})
    assert "(all rounded: 31.2)" in shown(tables[0])
    assert all(name in shown(tables[1]) for name in names)


ARTIFACT = {
    "backend": "executorch", "within_limits": False, "top1": 0.9, "drop_points": -0.25, "drop_ci95": (-1.11, 1.11), "agreement": 1,
    "agreement_ci95": (0.99, 1), "sqnr_db": 38.7, "sqnr_ci95": (38.1, 39.3), "size_bytes": 103.7e6, "float_size_bytes": 408.4e6,
    "latency_ms": {"p50": 163.8}, "float_latency_ms": {"p50": 207.8}, "speedup": 3.24,
}  # fmt: skip


def test_the_table_of_quantize_fits_80_columns_with_every_interval() -> None:
    text = shown(
        results_table({
            "model": "gcvit_base", "recipe": "int8_ptq_full", "images": 50_000, "float": {"top1": 0.9}, "artifacts": [ARTIFACT],
            "machine": {"threads": 16, "cpu": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz"},
        }),
        80,
    )  # fmt: skip
    for whole in ("-1.11 +1.11", "99.0 100.0", "±0.6", "of 408.4", "of 207.8", "3.24x", "over limit"):
        assert whole in text


def test_the_table_of_evaluate_fits_80_columns() -> None:
    text = shown(accuracy_table(report("int8", compared=True)), 80)
    for whole in ("executorch ", "80.0 95.0", "+0.10 +0.90", "98.0 99.5", "±1.0", "90 dB"):
        assert text.count(whole) == len(NAMES)


def test_the_table_of_export_fits_80_columns() -> None:
    latency = {"p50": 1234.56, "p90": 1345.67, "p99": 1456.78}
    entry = {
        "backend": "executorch",
        "precision": "float",
        "latency_ms": latency,
        "first_ms": 1567.8,
        "load_ms": 12345,
        "size_bytes": 408.4e6,
    }
    text = shown(timing_table("gcvit_base, float", [entry | {"peak_rss_mb": 2345}]), 80)
    for whole in ("executorch float", "1234.56", "1456.78", "1567.8", "12345", "408.4", "2345", "p50 ms"):
        assert whole in text


def test_a_device_that_is_alone_needs_no_column_unless_it_failed() -> None:
    for table in (accuracy_table, benchmark_table):
        assert "device" not in shown(table(report("int8", compared=True, names=["local"], error=None)))
        failed = shown(table(report("int8", compared=True, names=["local"])))
        assert "device" in failed
        assert "failed in part" in failed
        assert "device" in shown(table(report("int8", compared=True, names=["local", "pi"], error=None)))


def test_columns_of_a_comparison_are_shown_where_there_is_one() -> None:
    headings = ("drop", "agree", "SQNR")
    with_float, alone = shown(accuracy_table(report("float", "int8", compared=True))), shown(accuracy_table(report("int8", compared=False)))
    assert all(heading in with_float and heading not in alone for heading in headings)
    assert "+0.10 +0.90  98.0 99.5  ±1.0" in with_float
    assert all(value in with_float for value in ("+0.50", "99.00%", "30.0"))
    for text in (with_float, alone):
        assert "90.00%" in text
        assert "80.0 95.0" in text
        assert "90 dB" in text


def test_images_that_leave_open_whether_the_limit_is_kept() -> None:
    artifacts = [
        {"backend": "onnx", "drop_points": -1, "drop_ci95": [-3.7, 1.73]},
        {"backend": "openvino", "drop_points": -0.25, "drop_ci95": [-1, 0.5]},
        {"backend": "executorch", "drop_points": 3.0, "drop_ci95": [2.1, 3.9]},  # over it, as the table says
    ]
    (line,) = limit_warnings({"images": 100, "limits": {"max_drop": 0.5}, "artifacts": artifacts})
    assert line.startswith("warning: 100 images leave open whether the drop is within 0.5 points: its interval ends at +1.73 (onnx); ")
    assert limit_warnings({"images": 100, "limits": {"max_drop": 2.0}, "artifacts": artifacts}) == []
    assert limit_warnings({"images": 100, "limits": {"max_drop": 0.0}, "artifacts": artifacts}) == []  # which no images show
