"""What fails in part leaves the rest its place in the report."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from target_contract import BRIEF

import gcvit_edge.targets
from gcvit_edge.bundle import Bundle
from gcvit_edge.cli._options import report_error
from gcvit_edge.cpus import default_threads
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import Logits
from gcvit_edge.measurement.devices import find_devices
from gcvit_edge.measurement.measure import Interrupted, _references, benchmark_bundle, evaluate_bundle
from gcvit_edge.progress import Steps
from gcvit_edge.targets import local

COMPARING = """
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gcvit_edge.errors import CheckFailed
from gcvit_edge.targets import Case
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Local, Options, missing

HELP = "this machine, where the float artifact runs as one in INT8 too, a third has no file, and the end of the connection fails"


def cases(artifacts, options):
    (artifact,) = artifacts
    gone = replace(artifact, path=Path("gone.onnx"))
    return [Case(artifact, "cpu"), Case(replace(artifact, precision="int8"), "cpu", golden=artifact), Case(gone, "gone")]


@contextmanager
def connect(address, options):
    yield Local()
    raise CheckFailed("the network is gone")
"""


@pytest.fixture(autouse=True)
def comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "comparing.py").write_text(COMPARING)
    monkeypatch.setattr(gcvit_edge.targets, "__path__", [*gcvit_edge.targets.__path__, str(tmp_path / "target")])
    yield
    sys.modules.pop("gcvit_edge.targets.comparing", None)


@pytest.fixture
def images(bundle: Bundle, tmp_path: Path) -> Path:
    """An image of each class, all alike: the network is right once."""
    for name in bundle.info.labels.folders:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name / "black.png")
    return tmp_path / "images"


@pytest.mark.parametrize("devices", [["comparing"], ["comparing", "local"]])
def test_a_float_artifact_that_is_no_baseline_leaves_all_results(devices: list[str], bundle: Bundle, images: Path) -> None:
    report = evaluate_bundle(bundle, find_devices(devices, None, 1, {}), images, Steps())
    run = report.runs[0]
    assert [(result.precision, result.accuracy.top1, result.accuracy.drop_points) for result in run.results if result.accuracy] == [
        ("float", 1 / 8, None), ("int8", 1 / 8, None),
    ]  # fmt: skip
    gone, *_, baseline, network = (run.error or "").splitlines()
    assert gone.startswith("onnx.float (gone): gone.onnx does not run in onnx")
    assert baseline.startswith("onnx.float (cpu): the float model's top-1 is 12.5% on 8 images, no better than guessing (12.5%)")
    assert network == "the network is gone"
    error = report_error(report)
    assert type(error) is CheckFailed
    assert error.exit_code == 4


def test_integers_are_compared_with_the_float_of_their_own_runtime() -> None:
    labels = np.arange(20) % 4
    right = np.eye(4, dtype=np.float32)[labels]
    sure, unsure, wrong = 2 * right, right.copy(), -right

    def answer(backend: str, precision: str, logits: Logits, passed: bool = True) -> tuple[Any, Logits]:
        return SimpleNamespace(backend=backend, precision=precision, parity=SimpleNamespace(passed=passed)), logits

    answers = [
        answer("executorch", "float", wrong, passed=False), answer("openvino", "float", sure), answer("onnx", "float", unsure),
        answer("onnx", "float", sure), answer("onnx", "int8", wrong),
    ]  # fmt: skip
    references = _references(SimpleNamespace(failures=[]), answers, labels)  # type: ignore[arg-type]
    assert {backend: logits is (sure if backend == "openvino" else unsure) for backend, logits in references.items()} == {
        "openvino": True, "onnx": True,
    }  # fmt: skip
    assert _references(SimpleNamespace(failures=[]), answers[:4], labels) == {}  # type: ignore[arg-type]  # nothing to compare


def test_a_connection_that_fails_at_its_end_leaves_the_results(bundle: Bundle) -> None:
    (run,) = benchmark_bundle(bundle, find_devices(["comparing"], None, 1, {}), BRIEF, Steps()).runs
    assert [result.precision for result in run.results] == ["float", "int8"]
    assert (run.error or "").startswith("onnx.float (gone): ")
    assert (run.error or "").endswith("\nthe network is gone")


def test_more_threads_than_cpus_are_refused(bundle: Bundle) -> None:
    cpus = default_threads()
    message = f"local has {cpus} CPUs, fewer than the {cpus + 1} threads asked for"
    with pytest.raises(UserError, match=message):
        benchmark_bundle(bundle, find_devices(["local"], None, cpus + 1, {}), BRIEF, Steps())


def test_an_interruption_leaves_what_was_done_before(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connected = local.connect, iter([True, True, False, False])

    def interrupted(address: str, options: Any) -> Any:
        if next(connected):
            return connect(address, options)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "connect", interrupted)
    with pytest.raises(Interrupted, match="interrupted; the results are those of local, local, done before") as ended:
        benchmark_bundle(bundle, find_devices(["local"] * 3, None, 1, {}), BRIEF, Steps())
    assert [len(run.results) for run in ended.value.report.runs] == [1, 1]
    with pytest.raises(KeyboardInterrupt) as none_done:
        benchmark_bundle(bundle, find_devices(["local"] * 3, None, 1, {}), BRIEF, Steps())
    assert not isinstance(none_done.value, Interrupted)
