"""Several devices in one report, one of which does not answer, and one whose time says nothing."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from target_contract import BRIEF

import gcvit_edge.targets
from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.cli._options import report_error
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer
from gcvit_edge.measurement.devices import find_devices
from gcvit_edge.measurement.measure import benchmark_bundle, evaluate_bundle
from gcvit_edge.progress import Steps
from gcvit_edge.report.devices import benchmark_table, machine_lines
from gcvit_edge.targets import Case, load_target

ABSENT = """
from gcvit_edge.cli._options import report_error
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Options, cases, missing

HELP = "a device that is off"


def connect(address, options):
    raise UserError("it does not answer; switch it on")
"""
EMULATED = """
from gcvit_edge.targets.local import ADDRESS, Options, cases, connect, missing

HELP = "this machine, as if it were emulated"
MEASURES_TIME = False
"""
PICKY = """
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Options, connect, missing

HELP = "runs openvino"


def cases(artifacts, options):
    return []
"""
PARTLY = """
from dataclasses import replace
from pathlib import Path

from gcvit_edge.targets import Case
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Options, connect, missing

HELP = "this machine, without the file of one of two"


def cases(artifacts, options):
    gone = replace(artifacts[0], path=Path("gone.onnx"))
    return [Case(artifacts[0], "there"), Case(gone, "gone")]
"""

DYING = """
from contextlib import contextmanager

from gcvit_edge.targets import Case
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Local, Options, missing

HELP = "this machine, where one of two is killed as soon as it is loaded"


def cases(artifacts, options):
    return [Case(artifacts[0], "there"), Case(artifacts[0], "dies")]


class Deadly(Local):
    def open(self, case, threads, *, pinned):
        session = super().open(case, threads, pinned=pinned)
        if case.execution == "dies":
            session._process.kill()
        return session


@contextmanager
def connect(address, options):
    yield Deadly()
"""

CLINGING = """
from contextlib import contextmanager

from gcvit_edge.errors import CheckFailed
from gcvit_edge.targets.local import ADDRESS, MEASURES_TIME, Local, Options, Session, cases, missing

HELP = "this machine, as if it stopped to answer when it is done"


class Clinging(Session):
    def close(self):
        super().close()
        raise CheckFailed("it did not answer within 60 s")


class Silent(Local):
    def open(self, case, threads, *, pinned):
        return Clinging(case.artifact, threads, pinned=pinned)


@contextmanager
def connect(address, options):
    yield Silent()
"""


@pytest.fixture(autouse=True)
def more_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    files = {"absent": ABSENT, "emulated": EMULATED, "picky": PICKY, "partly": PARTLY, "dying": DYING, "clinging": CLINGING}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(gcvit_edge.targets, "__path__", [*gcvit_edge.targets.__path__, str(tmp_path)])
    yield
    for name in files:
        sys.modules.pop(f"gcvit_edge.targets.{name}", None)


def test_a_device_that_fails_does_not_end_the_others(bundle: Bundle) -> None:
    devices = find_devices(["absent", "emulated", "local"], None, 1, {})
    report = benchmark_bundle(bundle, devices, BRIEF, Steps(), ["onnx"])
    absent, emulated, local = report.runs
    assert (absent.results, absent.machine, absent.error) == ((), None, "it does not answer; switch it on")
    (here,), (there,) = local.results, emulated.results
    assert here.latency is not None
    assert here.energy_j is None or min(here.energy_j.values()) >= 0
    assert (there.latency, there.load_ms, there.first_ms, there.peak_rss_mb, there.energy_j) == (None,) * 5
    assert there.parity.passed
    assert emulated.emulated
    assert benchmark_table(report).row_count == 3
    assert machine_lines(report)[0].startswith("emulated: ")
    assert machine_lines(report)[0].endswith("; 1 thread; emulated: no times")


@pytest.mark.parametrize("together", [True, False])
def test_what_does_not_run_leaves_the_others_their_results(together: bool, bundle: Bundle) -> None:
    (run,) = benchmark_bundle(bundle, find_devices(["partly"], None, 1, {}), replace(BRIEF, together=together), Steps()).runs
    assert [(result.execution, result.latency is not None) for result in run.results] == [("there", True)]
    assert run.error is not None
    assert run.error.startswith("onnx.float (gone): gone.onnx does not run in onnx")


@pytest.mark.parametrize("together", [True, False])
def test_what_ends_while_it_is_timed_leaves_the_others_their_results(together: bool, bundle: Bundle) -> None:
    (run,) = benchmark_bundle(bundle, find_devices(["dying"], None, 1, {}), replace(BRIEF, together=together), Steps()).runs
    assert [(result.execution, result.latency is not None) for result in run.results] == [("there", True)]
    assert (run.error or "").startswith("onnx.float (dies): ")
    assert "(there)" not in (run.error or "")


def test_each_failure_is_of_its_own_case(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(artifacts: list[Artifact], options: object) -> list[Case]:
        return [Case(replace(artifacts[0], path=Path("gone.onnx")), "gone"), Case(artifacts[0], "dies")]

    monkeypatch.setattr(load_target("dying"), "cases", cases)
    with pytest.raises(CheckFailed) as caught:
        benchmark_bundle(bundle, find_devices(["dying"], None, 1, {}), replace(BRIEF, together=True), Steps())
    assert [str(caught.value).count(name) for name in ("onnx.float (gone): ", "onnx.float (dies): ", "(gone), ")] == [1, 1, 0]


def test_what_fails_when_it_is_closed_leaves_its_results(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / bundle.info.labels.folders[0]).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / bundle.info.labels.folders[0] / "black.png")
    devices = find_devices(["clinging"], None, 1, {})
    for report in (benchmark_bundle(bundle, devices, BRIEF, Steps()), evaluate_bundle(bundle, devices, tmp_path, Steps())):
        (run,) = report.runs
        assert [result.name for result in run.results] == ["onnx.float (cpu)"]
        assert run.error == "onnx.float (cpu): it did not answer within 60 s"


def test_wrong_answers_do_not_hide_what_failed(bundle: Bundle) -> None:
    report = benchmark_bundle(bundle, find_devices(["partly"], None, 1, {}), BRIEF, Steps())
    assert isinstance(report_error(report), CheckFailed)
    (run,) = report.runs
    wrong = run.results[0].model_copy(update={"parity": run.results[0].parity.model_copy(update={"passed": False})})
    error = report_error(report.model_copy(update={"runs": (run.model_copy(update={"results": (wrong,)}),)}))
    assert isinstance(error, WrongAnswer)
    assert "logits other than the golden ones" in str(error)
    assert "gone.onnx does not run in onnx" in str(error)


def test_evaluated_is_what_runs(bundle: Bundle, tmp_path: Path) -> None:
    for name in bundle.info.labels.folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "black.png")
    (run,) = evaluate_bundle(bundle, find_devices(["partly"], None, 1, {}), tmp_path, Steps()).runs
    assert [result.execution for result in run.results] == ["there"]
    assert (run.error or "").startswith("onnx.float (gone): gone.onnx does not run in onnx")


@pytest.mark.parametrize(("name", "message"), [("absent", "switch it on"), ("picky", "picky runs nothing of onnx.float; picky: runs")])
def test_the_only_device_ends_the_command(name: str, message: str, bundle: Bundle) -> None:
    with pytest.raises(UserError, match=message):
        benchmark_bundle(bundle, find_devices([name], None, 1, {}), BRIEF, Steps(), ["onnx"])
