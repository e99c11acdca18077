"""The command line, in this process and in one of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from tiny import Tiny

from gcvit_edge.cli import main

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Outcome:
    """What a command gave. code: exit code. out, err: standard output and error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """Runs the command line in this process, in an empty current folder."""

    def __init__(self, capfd: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capfd, self.folder = capfd, folder

    def __call__(self, *argv: object) -> Outcome:
        self.capfd.readouterr()
        code = main([str(argument) for argument in argv])
        captured = self.capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    def refuses(self, *argv: object) -> str:
        """Runs what must end with exit code 2, without output and without a file written; gives the message."""
        before = tree(self.folder)
        outcome = self(*argv)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        said = [line for line in outcome.err.splitlines() if not line.endswith(" ...") and not line.startswith("done ")]  # but for steps
        assert said[0].startswith("error: ")
        assert "Traceback" not in outcome.err
        assert tree(self.folder) == before
        return outcome.err


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((p.relative_to(folder).as_posix(), p.stat().st_mtime_ns if p.is_file() else 0) for p in folder.rglob("*"))


def own(tiny: Tiny) -> list[object]:
    """Options that make `quantize` take the tiny network and its images."""
    return [
        "--recipe", tiny.recipe, "--weights", tiny.weights, "--calib", tiny.calib, "--eval", tiny.evaluation, "--backends", "onnx",
    ]  # fmt: skip


def without(options: Sequence[object], name: str) -> list[object]:
    """The options less one with its value."""
    at = list(options).index(name)
    return [*options[:at], *options[at + 2 :]]


def gcvit(
    *argv: object, cwd: Path, stdout: int | IO[str] = subprocess.PIPE, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gcvit_edge", *map(str, argv)], cwd=cwd, stdout=stdout, stderr=stderr, text=True, timeout=120, check=False
    )
