"""The benchmark of GPUs, on the CPU: what can run there is measured and checked, what cannot is named, and a run goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import interrupted_writing
from programs import benchmark_file, benchmark_program

# not bfloat16, which takes minutes on CPUs without instructions for it; with CUDA graphs it fails on any CPU
EAGER, GRAPHS = "float32 eager", "bfloat16 graphs"


@pytest.fixture
def benchmark() -> Path:
    return benchmark_file("cuda")


def run(benchmark: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, benchmark, "--device", "cpu", "--models", "gcvit_xxtiny", "--batches", "2", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_on_the_cpu(benchmark: Path, tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    ran = run(benchmark, "--ways", EAGER, GRAPHS, "--json", file)
    assert ran.returncode == 1, ran.stderr
    measured, failed = json.loads(file.read_text())
    assert (measured["way"], measured["batch"], measured["device"], measured["passed"]) == (EAGER, 2, "cpu", True)
    assert measured["sqnr_db"] > 80
    assert measured["images_per_s"] == pytest.approx(2000 / measured["p50_ms"], rel=0.01, abs=0.051)  # one decimal
    assert failed["way"] == GRAPHS
    assert f"gcvit_xxtiny, batch 2, {GRAPHS}: failed: {failed['error']}" in ran.stdout
    again = run(benchmark, "--ways", EAGER, "--json", file)
    assert again.returncode == 0  # what was asked for is right
    assert f"batch 2, {EAGER}" not in again.stdout
    assert json.loads(file.read_text()) == [measured, failed]


def test_what_was_measured_outlives_an_interruption(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, file = benchmark_program("cuda").main, tmp_path / "cpu.json"
    monkeypatch.setitem(main.__globals__, "measure", lambda *_: {"error": "not measured"})
    monkeypatch.setattr(sys, "argv", [str(benchmark), "--device", "cpu", "--models", "gcvit_xxtiny", "--ways", EAGER, "--json", str(file)])
    with pytest.raises(SystemExit, match="1"):
        main()
    before = json.loads(file.read_text())
    assert [each["batch"] for each in before] == [1, 32, 256]
    with interrupted_writing():
        main()
    assert json.loads(file.read_text()) == before


def test_refusals(benchmark: Path) -> None:
    ran = run(benchmark, "--ways", "bfloat16 eagre")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "--ways: unknown way 'bfloat16 eagre'; did you mean 'bfloat16 eager'?" in ran.stderr


def test_the_reason_of_a_failure_is_the_error_and_not_the_advice_after_it(benchmark: Path) -> None:
    reason = benchmark_program("cuda").reason
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1', "torch._inductor.exc.InductorError: CppCompileError: none", "",
             "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"]  # fmt: skip
    assert reason("\n".join(lines)) == "torch._inductor.exc.InductorError: CppCompileError: none"
    assert reason("killed\n") == "killed"
    assert reason("") == ""
