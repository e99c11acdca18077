"""What every target does, as checks of a connected device: for `targets/test_target_contract.py`, and for the tests of targets
that need an address, which start a device of their own."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcvit_edge import targets
from gcvit_edge.bundle import Bundle
from gcvit_edge.data import Pixels
from gcvit_edge.errors import CheckFailed
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.measure import benchmark_bundle
from gcvit_edge.measurement.result import Report
from gcvit_edge.measurement.timing import Mode
from gcvit_edge.progress import Steps
from gcvit_edge.targets import Case, load_target

BRIEF = Mode("quick", min_runs=6, min_seconds=0, runs_a_turn=3, together=True, score=50)


def check_target(name: str, address: str, options: Any, bundle: Bundle, folder: Path) -> None:
    """The whole contract on one device. folder: an empty one to write in."""
    _check_module(name)
    target = load_target(name)
    cases = target.cases(bundle.artifacts, options)
    assert cases
    with target.connect(address, options) as connection:
        machine = connection.machine()
        assert machine.cpus >= 1
        assert machine.cpu
        _check_session(connection.open(cases[0], 1, pinned=False), cases[0], bundle, folder)
        _check_broken_artifact(connection, cases[0], folder)
    _check_report(Device(name, name, address, options, 1), bundle, cases)


def _check_module(name: str) -> None:
    target = load_target(name)
    assert target.HELP
    assert target.missing("") is None
    for field in fields(target.Options):
        assert field.metadata["help"]
        assert hasattr(target.Options(), field.name)


def _check_session(session: Any, case: Case, bundle: Bundle, folder: Path) -> None:
    classes = len(bundle.info.labels.names)
    preprocessing, count = bundle.info.preprocessing, 6
    pixels = np.random.default_rng(0).integers(0, 256, (count, *preprocessing.size, 3), np.uint8)
    np.save(folder / "pixels.npy", pixels)
    with session:
        assert session.load_ms > 0
        assert session.runtime
        assert session.runtime_version[0].isdigit()
        logits = session.infer(bundle.golden_input(), lambda: None)
        assert logits.dtype == np.float32
        assert bundle.parity(case, logits).passed
        assert len(session.time(bundle.golden_input()[:1], 3).ms) == 3
        assert len(session.time(bundle.golden_input()[:1], 2, untimed=3).ms) == 2
        assert min(session.time(bundle.golden_input()[:1], 2).ms) > 0
        done: list[int] = []
        with pytest.MonkeyPatch.context() as patch:  # in two chunks
            patch.setattr(targets, "CHUNK_BYTES", 4 * preprocessing.normalize(pixels[0]).nbytes)
            streamed = session.run(Pixels(folder / "pixels.npy", np.arange(count), ()), preprocessing, 0, count, lambda: done.append(1))
        assert len(done) == count
        assert streamed.shape == (count, classes)
        last = session.infer(preprocessing.normalize(pixels[-1]), lambda: None)
        np.testing.assert_array_equal(streamed[-1:], last)  # every image has its own answer, in order
        assert not np.array_equal(streamed[0], streamed[-1])
        assert session.peak_rss_mb() >= session.runtime_rss_mb > 0


def _check_broken_artifact(connection: Any, case: Case, folder: Path) -> None:
    broken = folder / case.artifact.path.name
    broken.write_bytes(b"no model at all")
    artifact = type(case.artifact)(case.artifact.backend, case.artifact.precision, broken, (broken,))
    with pytest.raises(CheckFailed, match=broken.name):
        connection.open(replace(case, artifact=artifact), 1, pinned=False)


def _check_report(device: Device, bundle: Bundle, cases: list[Case]) -> None:
    report = benchmark_bundle(bundle, [device], BRIEF, Steps())
    assert Report.model_validate_json(json.dumps(report.model_dump(mode="json"))) == report
    assert report.wrong == []
    (run,) = report.runs
    assert run.error is None
    assert [(result.backend, result.execution) for result in run.results] == [(case.artifact.backend, case.execution) for case in cases]
    for result in run.results:
        assert result.parity.passed
        if run.emulated:
            assert (result.latency, result.load_ms, result.first_ms, result.energy_j) == (None, None, None, None)
        else:
            assert result.latency is not None
            assert len(result.latency.samples_ms) == 6
