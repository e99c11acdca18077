"""The command line in an empty folder, and the bundle that it makes of a tiny network."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, gcvit, own
from tiny import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hangup() -> Iterator[None]:
    """A hangup ends what gets it, and what this process starts, under nohup too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def command(hangup: None, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
    monkeypatch.setattr("gcvit_edge.export.TIMED_ROUNDS", 2)
    yield Command(capfd, tmp_path)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The bundle of `quantize --json`, float artifact included, in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    return folder / "bundle", gcvit("quantize", *own(tiny), "--keep-float", "-o", "bundle", "--threads", 1, "--json", cwd=folder)


@pytest.fixture(scope="session")
def bundle(made: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return made[0]
