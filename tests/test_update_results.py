"""scripts/update_results.py: what it refuses to put side by side."""

import json
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import program

PATH = Path(__file__).parents[1] / "scripts" / "update_results.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with an empty folder as the checkout."""
    module = program(PATH)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "results" / "vs_stock").mkdir(parents=True)
    return module


def add_run(script: ModuleType, model: str, cpu: str, threads: int = 2, gmac: float = 2.0, ms: float = 10.0) -> None:
    """A run against the stock way, as benchmarks/vs_stock.py writes it. ms: of our INT8; all else takes 10."""
    entries: list[dict[str, Any]] = [
        {
            "model": model, "img_size": [224, 224], "recipe": "int8_ptq", "cpu": cpu, "threads": threads, "gmac": gmac,
            "floor_ms": gmac, "runtime": runtime, "form": form, "precision": precision,
            "p50_ms": ms if (form, precision) == ("ours", "int8") else 10.0, "speedup_vs_stock_float": 2.0, "size_bytes": 1_000_000,
        }
        for runtime, form, precision in product(script.RUNTIMES, ("stock", "ours"), ("float", "int8"))
    ]  # fmt: skip
    (script.ROOT / "results" / "vs_stock" / f"{model}_{cpu}_{threads}.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("page", program(PATH).TABLES)
def test_the_tables_of_a_page_are_those_of_the_results(page: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", PATH.parents[1])
    assert script.updated(page) == (PATH.parents[1] / page).read_text()


def test_stock_table(script: ModuleType) -> None:
    add_run(script, "gcvit_xxtiny", "A", threads=2)
    add_run(script, "gcvit_xxtiny", "B", threads=4)
    text = script.stock_table()
    assert "A, `int8_ptq`, 2 threads, batch 1:" in text
    assert "B, `int8_ptq`, 4 threads, batch 1:" in text
    assert text.count("| gcvit_xxtiny, 224 px | openvino | 10.0 ms | 10.0 ms, 2.00x |") == 2


def test_stock_table_refuses_different_threads_on_a_cpu(script: ModuleType) -> None:
    add_run(script, "gcvit_xxtiny", "A", threads=2)
    add_run(script, "gcvit_base", "A", threads=4)
    with pytest.raises(SystemExit, match="of A are of `int8_ptq`, 2 threads and `int8_ptq`, 4 threads"):
        script.stock_table()


def test_growth_table_has_what_each_cpu_ran_in_the_order_of_size(script: ModuleType) -> None:
    for model, gmac, ms in (("gcvit_base", 14.0, 12.0), ("gcvit_xxtiny", 2.0, 3.0), ("gcvit_tiny", 5.0, 6.0)):
        add_run(script, model, "A", gmac=gmac, ms=ms)
    add_run(script, "gcvit_xxtiny", "B", gmac=2.0, ms=4.0)
    add_run(script, "gcvit_small", "B", gmac=8.0, ms=9.0)
    *_, multiplications, a, b = script.growth_table().splitlines()
    assert multiplications == f"| multiplications (2.00, 5.00, 8.00, 14.00 GMAC) |{' 2.50 / 4.00 / 7.00 |' * 3} | |"
    assert a == "| A: T, B | 2.0 / 4.0 | 2.0 / 4.0 | 2.0 / 4.0 | 2.0 / 5.0 / 14.0 | 1.5 / 1.2 / 0.7 |"
    assert b == "| B: S | 2.2 | 2.2 | 2.2 | 2.0 / 8.0 | 2.0 / 1.1 |"


def test_stock_picture_shows_the_cpus_that_ran_every_model(script: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    for model, cpu in (("gcvit_xxtiny", "A"), ("gcvit_base", "A"), ("gcvit_xxtiny", "B")):
        add_run(script, model, cpu)
    titles = [axes.get_title(loc="left") for axes in script.stock_picture(script.stock_runs()).axes]
    assert titles == ["gcvit_xxtiny, A", "gcvit_base, A"]


def test_tables_of_accuracy_have_intervals(script: ModuleType) -> None:
    measured = {
        "backend": "onnx", "images": 5000, "top1": 0.4, "drop_points": 0.04, "drop_ci95": [-0.09, 0.17], "agreement": 0.9936,
        "agreement_ci95": [0.991, 0.9955], "sqnr_db": 39.9, "sqnr_ci95": [39.8, 40.0], "size_bytes": 12e6,
    }  # fmt: skip
    intervals = "+0.04 (-0.09 to +0.17) | 99.36% (99.10 to 99.55) | 39.9 ± 0.10 |"
    (script.ROOT / "results" / "accuracy").mkdir()
    rows = [measured | {"row": name, "cross": None} for name in ("stock INT8", "int8_ptq, no smoothing")]
    (script.ROOT / "results" / "accuracy" / "a.json").write_text(json.dumps(rows))
    recipes, ablation = script.accuracy_table().split("<details>")
    assert f"| stock INT8 | onnx | 5,000 | 40.00% | {intervals}" in recipes
    assert f"| int8_ptq, no smoothing | onnx | 5,000 | 40.00% | {intervals}" in ablation

    (script.ROOT / "results" / "auto").mkdir()
    latency = {"float": 9.0, "plain": 6.0, "chosen": 7.0, "safe": 8.0, "predicted": 7.1}
    searched = {"found": ["head"], "safe_choice": ["stem", "head"], "latency_ms": latency}
    nothing = {"found": [], "safe_choice": [], "latency_ms": None}
    entries = [measured | {"search": searched}, measured | {"search": nothing}]
    report = {"images": 5000, "limits": {"max_drop": 0.3}, "artifacts": entries}
    (script.ROOT / "results" / "auto" / "tiny_imagenet.json").write_text(json.dumps(report))
    text = script.auto_table()
    assert f"| tiny imagenet, 5,000, limit 0.3 | onnx | 1 / 2 | {intervals} 6.0 / 7.0 / 8.0 / 9.0 |" in text
    assert f"| tiny imagenet, 5,000, limit 0.3 | onnx | none: `int8_ptq` is within it | {intervals}  |" in text


def test_all_is_written_or_nothing(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    add_run(script, "gcvit_xxtiny", "A")
    page = script.ROOT / "README.md"
    page.write_text("<!-- vs_stock -->\nof before\n<!-- /vs_stock -->\n")
    monkeypatch.setattr(script, "TABLES", {"README.md": {"vs_stock": script.stock_table}})
    with pytest.raises(SystemExit, match="no CPU that ran all of gcvit_xxtiny, gcvit_base"):
        script.main()
    assert "of before" in page.read_text()

    add_run(script, "gcvit_base", "A")
    script.main()
    assert "of before" not in page.read_text()
    assert page.read_text() == f"<!-- vs_stock -->\n{script.stock_table()}\n<!-- /vs_stock -->\n"
    assert (script.ROOT / "results" / "vs_stock.svg").stat().st_size > 1000
