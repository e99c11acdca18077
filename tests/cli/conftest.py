"""The command line in an empty folder, and the bundle that it makes of a tiny network."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command, gcvit, own
from tiny import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what gets them, and what it starts, under nohup too; a command's handlers are gone afterwards."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(default_signals: None, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
    monkeypatch.setattr("gcvit_edge.export.TIMED_ROUNDS", 2)
    return Command(capfd, tmp_path)


@pytest.fixture(scope="session")
def made(tiny: Tiny, made_once: Callable[..., Path]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The bundle of `quantize --json`, float artifact included, in a process of its own, and what it printed."""

    def make(folder: Path) -> None:
        (folder / "current").mkdir()
        done = gcvit("quantize", *own(tiny), "--with-float", "-o", "bundle", "--threads", 1, "--json", cwd=folder / "current")
        (folder / "done.json").write_text(json.dumps(vars(done), default=str))

    folder = made_once("cli", make)
    return folder / "current" / "bundle", subprocess.CompletedProcess(**json.loads((folder / "done.json").read_text()))


@pytest.fixture(scope="session")
def bundle(made: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return made[0]
