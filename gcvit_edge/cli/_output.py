"""Keeping our output apart from what the runtimes and exporters print, some of it from C++ straight to the descriptors; and the end
where it cannot be written."""

import errno
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, NoReturn

from rich.console import Console

_UNWRITABLE = {errno.EPIPE: 141, errno.ENOSPC: 4, errno.EDQUOT: 4}  # exit codes; 141: as shells say it of a program that SIGPIPE ends


def is_unwritable(error: BaseException) -> bool:
    """Whether it says that who reads our output has gone, or that a disk is full."""
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


@contextmanager
def unwritable_ends() -> Iterator[None]:
    """Makes such an error an exit code: without a word if nobody reads, else with one line."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # --help and --schema print there
    except OSError as error:
        if not is_unwritable(error):
            raise
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                what = error.filename or f"the output, or for temporary files in {tempfile.gettempdir()}"
                print(f"error: {error.strerror}; make room for {what}", file=sys.stderr, flush=True)
        for descriptor in (1, 2):  # what is left to write goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        raise SystemExit(_UNWRITABLE[error.errno or 0]) from None


class Terminal(Console):
    """A console that says when its reader has gone; rich's own would end the process there and then."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


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
        _stream(saved[0]) as out,
        _stream(saved[1]) as err,
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


@contextmanager
def _stream(descriptor: int) -> Iterator[IO[str]]:
    stream = os.fdopen(descriptor, "w", errors="backslashreplace", closefd=False)  # names of files may be no text
    try:
        yield stream
    finally:
        with suppress(OSError):  # of a text whose flush has raised it before
            stream.close()
