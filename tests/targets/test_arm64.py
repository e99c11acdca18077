"""64-bit ARM by emulation: the same answers as here, by the instructions that each CPU has, counted."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from quantized import IMAGES
from target_contract import BRIEF

from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.measure import benchmark_bundle
from gcvit_edge.measurement.parity import MIN_SQNR_DB
from gcvit_edge.progress import Steps
from gcvit_edge.report.devices import count_lines
from gcvit_edge.targets import Case, local
from gcvit_edge.targets.arm64 import Options, cases, connect, missing, qemu_cpu

pytestmark = pytest.mark.skipif(missing("") is not None and os.environ.get("CI") != "true", reason=missing("") or "")


@pytest.fixture(scope="module")
def int8(quantized: Callable[[str, str], Artifact]) -> Artifact:
    """A random network in INT8."""
    return quantized("int8_ptq", "executorch")


@pytest.fixture(scope="module")
def here(int8: Artifact) -> np.ndarray:
    """Its logits on this machine."""
    with local.Session(int8, 1) as session:
        return session.infer(IMAGES, lambda: None)


def test_float_as_here(pte_bundle: Bundle) -> None:
    artifact = pte_bundle.artifact("executorch")
    with connect("", Options()) as arm, arm.open(Case(artifact, "cpu"), 1, pinned=False) as session:
        logits = session.infer(pte_bundle.golden_input(), lambda: None)
        assert session.counts(pte_bundle.golden_input()[:1]) == {}
    level = sqnr_db(logits, pte_bundle.golden_logits(artifact))
    assert 100 < level < 300  # other kernels: close, but not the same bits


@pytest.mark.parametrize(
    ("cpu", "used", "lacking"), [("cortex-a53", (), ("sdot", "smmla")), ("cortex-a76", ("sdot",), ("smmla",)), ("max", ("smmla",), ())]
)
def test_int8_by_the_instructions_of_the_cpu(
    cpu: str, used: tuple[str, ...], lacking: tuple[str, ...], int8: Artifact, here: np.ndarray
) -> None:
    with connect("", Options(cpu=cpu, count=True)) as arm, arm.open(Case(int8, "cpu"), 1, pinned=False) as session:
        assert arm.machine().architecture == "aarch64"
        assert arm.machine().cpu.startswith(f"{cpu} of QEMU ")
        assert sqnr_db(session.infer(IMAGES, lambda: None), here) > 20  # not bit-exact between instruction sets
        counts, again = session.counts(IMAGES[:1]), session.counts(IMAGES[:1])
    assert all(counts[name] > 0 for name in used)  # `max` has dot products too, and XNNPACK takes them for some
    assert all(counts[name] == 0 for name in lacking)
    assert 0 < counts["fmla"] < counts["instructions"]
    assert {name: counts[name] for name in ("sdot", "smmla", "fmla")} == {name: again[name] for name in ("sdot", "smmla", "fmla")}
    # starting a process takes some 10,000 instructions more or less, which is 1 % of this network and 0.003 % of XXT
    assert again["instructions"] == pytest.approx(counts["instructions"], abs=5e4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8_ptq_full", "w4a8_ptq"])
def test_other_integers_as_here(recipe: str, quantized: Callable[[str, str], Artifact]) -> None:
    artifact = quantized(recipe, "executorch")
    with connect("", Options()) as arm, arm.open(Case(artifact, "cpu"), 1, pinned=False) as there, local.Session(artifact, 1) as here:
        assert sqnr_db(there.infer(IMAGES, lambda: None), here.infer(IMAGES, lambda: None)) > MIN_SQNR_DB[artifact.precision]


def test_counts_are_in_the_report(pte_bundle: Bundle) -> None:
    options = Options(count=True)
    assert [case.name for case in cases(pte_bundle.artifacts, options)] == ["executorch.float (cpu)"]
    report = benchmark_bundle(pte_bundle, [Device("arm64", "arm64", "", options, 1)], BRIEF, Steps())
    (result,) = report.runs[0].results
    assert result.counts["fmla"] > 0
    assert result.latency is None
    (line,) = count_lines(report)
    assert line.startswith("arm64: executorch.float (cpu): ")
    assert f"{result.counts['instructions'] / 1e6:.2f} M instructions" in line


def test_nothing_is_left_behind(int8: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with connect("", Options(count=True)) as arm, arm.open(Case(int8, "cpu"), 1, pinned=False):
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_a_comma_in_the_folder_for_temporary_files(pte_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To QEMU it is the end of an argument."""
    (tmp_path / "a,b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a,b"))
    options = Options(count=True)
    with connect("", options) as arm, arm.open(cases(pte_bundle.artifacts, options)[0], 1, pinned=False) as session:
        assert session.counts(pte_bundle.golden_input()[:1])["instructions"] > 0


@pytest.mark.parametrize(
    ("version", "option"), [("6.2.0", "max"), ("7.0.0", "max"), ("7.1.0", "max,sme=off"), ("10.0.0-rc1", "max,sme=off")]
)
def test_what_is_switched_off_in_qemu(version: str, option: str) -> None:
    assert qemu_cpu("max", version) == option
    assert qemu_cpu("cortex-a76", version) == "cortex-a76"


def test_unknown_cpu() -> None:
    said = pytest.raises(UserError, match=r"unknown emulated CPU 'cortex-a72'; did you mean 'cortex-a76'\? known: cortex-a53")
    with said, connect("", Options(cpu="cortex-a72")):
        pass
