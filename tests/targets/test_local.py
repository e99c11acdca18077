"""This machine: pinning, the protocol of the process, and what happens when it dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gcvit_edge import cpus as cpus_module
from gcvit_edge.bundle import Bundle
from gcvit_edge.cpus import fastest_here
from gcvit_edge.data import Pixels
from gcvit_edge.errors import CheckFailed
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.measure import _evaluate, _Site
from gcvit_edge.targets import Case, Hold, local, side_by_side
from gcvit_edge.targets.local import Local, Options, Session, run_artifacts


def test_pinned_to_as_many_cpus_as_threads(bundle: Bundle) -> None:
    artifact = bundle.artifact("onnx")
    cpus = fastest_here()
    assert sorted(cpus) == sorted(os.sched_getaffinity(0))
    with Session(artifact, 1, pinned=True) as pinned, Session(artifact, 1) as free, Session(artifact, len(cpus), pinned=True) as every:
        assert os.sched_getaffinity(pinned._process.pid) == ({cpus[0]} if len(cpus) > 1 else set(cpus))
        assert os.sched_getaffinity(free._process.pid) == set(cpus)
        assert os.sched_getaffinity(every._process.pid) == set(cpus)


def test_pinned_to_the_fastest(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    for cpu in cpus:
        (tmp_path / f"cpu{cpu}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "cpufreq" / "cpuinfo_max_freq").write_text("2400000\n" if cpu == cpus[-1] else "1800000\n")
    monkeypatch.setattr(cpus_module, "CPUS_SCRIPT", cpus_module.CPUS_SCRIPT.replace("/sys/devices/system/cpu", str(tmp_path)))
    with Session(bundle.artifact("onnx"), 1, pinned=True) as session:
        assert os.sched_getaffinity(session._process.pid) == {cpus[-1]}


def test_protocol(bundle: Bundle, tmp_path: Path) -> None:
    artifact, inputs = bundle.artifact("onnx"), bundle.golden_input()
    inputs.tofile(tmp_path / "in.f32")
    inputs[:1].tofile(tmp_path / "one.f32")
    shape = "\t".join(map(str, inputs.shape))
    size = shape.partition("\t")[2]
    commands = f"infer\t{tmp_path}/in.f32\t{tmp_path}/out.f32\t{shape}\ntime\t{tmp_path}/one.f32\t1\t2\t{size}\nmemory\n"
    worker = [sys.executable, "-m", "gcvit_edge.targets._worker", "onnx", str(artifact.path), "1"]
    done = subprocess.run(worker, input=commands, capture_output=True, text=True, timeout=60, check=True)
    ready, *images, finished, timed, memory = map(json.loads, done.stdout.splitlines())
    assert set(ready) == {"load_ms", "runtime_rss_mb", "runtime", "runtime_version"}
    assert images == [{"done": 1}] * len(inputs)
    assert finished == {"finished": True}
    assert len(timed["ms"]) == 2
    assert isinstance(timed["joules"], dict)
    assert memory["peak_rss_mb"] > ready["runtime_rss_mb"]
    logits = np.fromfile(tmp_path / "out.f32", "<f4").reshape(len(inputs), -1)
    np.testing.assert_allclose(logits, bundle.golden_logits(artifact), atol=1e-4)


def test_code_in_the_current_folder_is_not_run(bundle: Bundle, shadowed: None) -> None:
    with Session(bundle.artifact("onnx"), 1) as session:
        assert session.runtime == "onnxruntime"


def test_images_are_divided_among_cpus(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, preprocessing = bundle.artifact("onnx"), bundle.info.preprocessing
    np.save(tmp_path / "pixels.npy", np.random.default_rng(0).integers(0, 256, (7, *preprocessing.size, 3), np.uint8))
    pixels = Pixels(tmp_path / "pixels.npy", np.arange(7), ())
    with Session(artifact, 1) as session:
        expected = session.run(pixels, preprocessing, 0, 7, lambda: None)
    monkeypatch.setattr(local, "default_threads", lambda: 3)
    done: list[None] = []
    for share in (128, 1):  # one process for all, and three with at most three images each
        monkeypatch.setattr(local, "MIN_SHARE", share)
        for logits in run_artifacts([artifact, artifact], pixels, preprocessing, lambda: done.append(None)):
            np.testing.assert_array_equal(logits, expected)
    assert len(done) == 2 * 2 * 7


def run_shares(bundle: Bundle, pixels: Pixels, advance: Callable[[], object]) -> None:
    run_artifacts([bundle.artifact("onnx")], pixels, bundle.info.preprocessing, advance)


def evaluate_twice(bundle: Bundle, pixels: Pixels, advance: Callable[[], object]) -> None:
    site = _Site(Device("local", "local", "", Options(), 1), Local(), 1, emulated=False, failures=[])
    _evaluate(bundle, site, [Case(bundle.artifact("onnx"), "cpu")] * 2, pixels, np.zeros(len(pixels.kept), np.int64), advance)


@pytest.mark.parametrize("work", [run_shares, evaluate_twice])
@pytest.mark.parametrize("cpus", [1, 3])
def test_an_interruption_ends_what_runs(
    work: Callable[..., None], cpus: int, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, done = 3000, []
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(local, "default_threads", lambda: cpus)
    np.save(tmp_path / "pixels.npy", np.zeros((count, *bundle.info.preprocessing.size, 3), np.uint8))

    def advance() -> None:
        done.append(None)
        if len(done) == 5:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work(bundle, Pixels(tmp_path / "pixels.npy", np.arange(count), ()), advance)
    assert len(done) < count / 2
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_is_loaded_too_late_is_closed_unused() -> None:
    closed, used, loading = [], [], threading.Event()

    class Late:
        def close(self) -> None:
            closed.append(self)

    def work(job: str, hold: Hold) -> None:
        if job == "fails":
            loading.wait(10)
            raise CheckFailed("it fails")
        loading.set()
        time.sleep(0.3)
        with hold(cast(Any, Late())):
            used.append(job)

    with pytest.raises(CheckFailed, match="it fails"):
        side_by_side(work, ["fails", "late"], 2)
    assert (len(closed), used) == (1, [])


def test_what_fails_first_ends_all_that_is_queued() -> None:
    started = []

    def work(job: int, hold: Hold) -> None:
        started.append(job)
        if job == 1:
            raise CheckFailed("it fails")
        time.sleep(0.5)

    with pytest.raises(CheckFailed, match="it fails"):
        side_by_side(work, range(8), 2)
    assert len(started) <= 4


def test_one_at_a_time_needs_no_thread() -> None:
    main = threading.main_thread()
    assert side_by_side(lambda job, _: (job, threading.current_thread()), [1, 2], 1) == [(1, main), (2, main)]


def test_a_process_that_dies_says_why(bundle: Bundle) -> None:
    with Session(bundle.artifact("onnx"), 1) as session:
        wrong = np.zeros((1, 3, 7, 7), np.float32)
        with pytest.raises(CheckFailed, match=r"model\.float\.onnx does not run in onnx \(process ended with 1\)"):
            session.infer(wrong, lambda: None)


def test_nothing_is_left_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Session(bundle.artifact("onnx"), 1) as session:
        session.infer(bundle.golden_input(), lambda: None)
        assert list(tmp_path.iterdir())
        process = session._process
    assert list(tmp_path.iterdir()) == []
    assert process.returncode is not None
