"""The native runner: the same bits as ExecuTorch's Python runtime, without Python; profiles; and what it says when something is wrong."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from quantized import IMAGES

from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.cpus import fastest_here
from gcvit_edge.errors import CheckFailed
from gcvit_edge.native.build import RunnerFiles, build_runner
from gcvit_edge.targets import Case, local
from gcvit_edge.targets.runner import NativeRunner, Options, cases, missing

pytestmark = pytest.mark.skipif(missing("") is not None and os.environ.get("CI") != "true", reason=missing("") or "")


@pytest.fixture(scope="module")
def runner() -> RunnerFiles:
    return build_runner()


@pytest.fixture(scope="module")
def artifact(pte_bundle: Bundle) -> Artifact:
    return pte_bundle.artifact("executorch")


def test_only_executorch(pte_bundle: Bundle) -> None:
    assert [case.name for case in cases(pte_bundle.artifacts, Options())] == ["executorch.float (cpu)"]


def test_same_bits_as_the_python_runtime(runner: RunnerFiles, pte_bundle: Bundle, artifact: Artifact) -> None:
    images = pte_bundle.golden_input()
    with NativeRunner(runner, Options()).open(Case(artifact, "cpu"), 1, pinned=False) as native, local.Session(artifact, 1) as python:
        np.testing.assert_array_equal(native.infer(images, lambda: None), python.infer(images, lambda: None))
        assert native.runtime_version == python.runtime_version
        assert native.runtime_rss_mb < python.runtime_rss_mb / 10  # no PyTorch


@pytest.mark.parametrize("recipe", ["int8_ptq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8_ptq_full", "w4a8_ptq"))])
def test_same_bits_in_integers(runner: RunnerFiles, quantized: Callable[[str, str], Artifact], recipe: str) -> None:
    artifact = quantized(recipe, "executorch")
    with NativeRunner(runner, Options()).open(Case(artifact, "cpu"), 1, pinned=False) as native, local.Session(artifact, 1) as python:
        np.testing.assert_array_equal(native.infer(IMAGES, lambda: None), python.infer(IMAGES, lambda: None))


def test_threads_and_cpus(runner: RunnerFiles, artifact: Artifact) -> None:
    device, cpus = NativeRunner(runner, Options()), fastest_here()
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    with device.open(Case(artifact, "cpu"), 1, pinned=True) as one, device.open(Case(artifact, "cpu"), 2, pinned=False) as two:
        assert os.sched_getaffinity(one._process.pid) == {cpus[0]}
        assert [len(os.listdir(f"/proc/{session._process.pid}/task")) for session in (one, two)] == [1, 2]


def test_profile_of_the_last_timed_runs(runner: RunnerFiles, pte_bundle: Bundle, artifact: Artifact, tmp_path: Path) -> None:
    from executorch.devtools import Inspector

    image = pte_bundle.golden_input()[:1]
    with NativeRunner(runner, Options(etdump=tmp_path / "profiles")).open(Case(artifact, "cpu"), 1, pinned=True) as session:
        session.time(image, 5)
        session.infer(image, lambda: None)
        session.time(image, 3)
    (block,) = Inspector(etdump_path=str(tmp_path / "profiles" / "model.float.etdump")).event_blocks
    operators = [event for event in block.events if event.is_delegated_op]
    assert {len(event.perf_data.raw) for event in operators} == {3}
    assert any("Convolution" in event.name for event in operators)
    (whole,) = [event for event in block.events if event.name == "Method::execute"]
    assert 0 < sum(event.perf_data.p50 for event in operators) <= 1.5 * whole.perf_data.p50


def test_needs_only_what_is_copied(runner: RunnerFiles, artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(runner.executable.parent, tmp_path / "device")
    command = [tmp_path / "device" / runner.executable.name, artifact.path, "1"]
    done = subprocess.run(command, input="memory\n", env={}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2
    linked = subprocess.run(["ldd", command[0]], env={}, capture_output=True, text=True, check=True).stdout
    found = {line.split()[0]: line.split()[2] for line in linked.splitlines() if "libexecutorch" in line}
    assert set(found) == {library.name for library in runner.libraries}
    assert all(Path(path).resolve().is_relative_to(tmp_path) for path in found.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: gcvit-edge-runner FILE.pte THREADS"),
        (["MODEL", "0"], "THREADS must be at least 1, got 0"),
        (["MODEL", "two"], "THREADS must be a whole number from 0, got 'two'"),
        (["MODEL", "1", "--cpu", "0"], "unknown option '--cpu'; known: --cpus, --etdump"),
        (["MODEL", "1", "--cpus", "1000"], "cannot pin to these CPUs"),
        (["nowhere.pte", "1"], "cannot load nowhere.pte: ExecuTorch says Error::"),
    ],
)
def test_refused(words: list[str], message: str, runner: RunnerFiles, artifact: Artifact) -> None:
    command = [runner.executable, *(str(artifact.path) if word == "MODEL" else word for word in words)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run\tx", "unknown command 'run'; known: infer IN OUT N C H W"),
        ("time\tshort.f32\t0\t1\t3\t64\t64", "short.f32 has fewer than 12288 float32 values"),
        ("time\tshort.f32\t0\t-1\t1\t1\t1", "RUNS must be a whole number from 0, got '-1'"),
        ("time\tshort.f32\t-1\t1\t1\t1\t1", "UNTIMED must be a whole number from 0, got '-1'"),
        ("time\tshort.f32\t0\t1\t1\t1\t1", "cannot run: ExecuTorch says Error::"),
    ],
)
def test_commands_that_fail(command: str, message: str, runner: RunnerFiles, artifact: Artifact, tmp_path: Path) -> None:
    np.zeros(1, "<f4").tofile(tmp_path / "short.f32")
    started = [runner.executable, artifact.path, "1"]
    done = subprocess.run(started, input=f"{command}\n", cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert message in done.stderr


def test_wrong_shape_through_the_session(runner: RunnerFiles, artifact: Artifact) -> None:
    said = pytest.raises(CheckFailed, match=r"model\.float\.pte does not run in executorch \(process ended with 1\)")
    with NativeRunner(runner, Options()).open(Case(artifact, "cpu"), 1, pinned=False) as session, said:
        session.infer(np.zeros((1, 3, 7, 7), np.float32), lambda: None)
