"""Keeping our output apart from what the runtimes and exporters print, some of it from C++ straight to the descriptors."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Streams:
    """out, err: the real standard output and error. noise: where descriptors 1 and 2 lead meanwhile."""

    out: IO[str]
    err: IO[str]
    noise: IO[str]

    def noise_tail(self) -> str:
        """The last lines that the tools printed."""
        self.noise.seek(0)
        return "".join(self.noise.readlines()[-30:])


@contextmanager
def captured_noise() -> Iterator[Streams]:
    """Sends descriptors 1 and 2 of this process and its children to a temporary file, and hands out the real ones."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as noise,
        os.fdopen(saved[0], "w", closefd=False) as out,
        os.fdopen(saved[1], "w", closefd=False) as err,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        try:
            yield Streams(out, err, noise)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
    os.close(saved[0])
    os.close(saved[1])
