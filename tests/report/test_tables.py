"""Tables show names as users gave them, and no column that is empty."""

import io

from rich.console import Console, RenderableType

from gcvit_edge.measurement.parity import Parity
from gcvit_edge.measurement.result import Accuracy, Report, Result, Run
from gcvit_edge.report.analysis import analysis_tables
from gcvit_edge.report.devices import accuracy_table, benchmark_table

NAMES = ("pi [lab]", "pi[/dev/ttyUSB0]", "[red]")


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200, emoji=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def report(*precisions: str, compared: bool) -> Report:
    """Of devices with the NAMES, each of which failed in the end. compared: with a float artifact."""

    def result(precision: str) -> Result:
        of_drop = {"drop_points": 0.5, "drop_ci95": (0.1, 0.9), "agreement": 0.99, "sqnr_db": 30.0}
        accuracy = Accuracy(images=40, top1=0.9, top1_ci95=(0.8, 0.95), top5=1, **(of_drop if compared and precision != "float" else {}))
        return Result(
            backend="onnx", precision=precision, execution="cpu", runtime="r", runtime_version="1", threads=1, files={"m": 1000},
            load_ms=1, peak_rss_mb=1, runtime_rss_mb=1, parity=Parity(sqnr_db=90, minimum_db=20, same_top1=1, passed=True),
            accuracy=accuracy, energy_j={"VDD[5V]": 0.1},
        )  # fmt: skip

    ran = [
        Run(device=name, target="ssh", emulated=False, machine=None, results=tuple(map(result, precisions)), error="it is off")
        for name in NAMES
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
        "backend": "onnx", "layers": [], "all_rounded_db": 31.25, "logits": logits, "int8_ms": 1, "float_ms": 1,
        "pareto": {"order": [], "frontier": [(0, 1, 1)]},
        "drift": {"all": drift, "classes": [drift | {"class": name} for name in names]},
    }  # fmt: skip
    tables = analysis_tables({"images": {"sensitivity": 1}, "backends": [entry], "activations": []})
    assert "(all rounded: 31.2)" in shown(tables[0])
    assert all(name in shown(tables[1]) for name in names)


def test_columns_of_a_comparison_are_shown_where_there_is_one() -> None:
    headings = ("drop, points", "agreement", "SQNR")
    with_float, alone = shown(accuracy_table(report("float", "int8", compared=True))), shown(accuracy_table(report("int8", compared=False)))
    assert all(heading in with_float and heading not in alone for heading in headings)
    assert "30.0 dB" in with_float
    for text in (with_float, alone):
        assert "90.00% (80.00% to 95.00%)" in text
        assert "90 dB" in text
