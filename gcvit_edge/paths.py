"""Paths that people give, and files that are written whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcvit_edge.errors import UserError


def require_file(path: Path, what: str) -> None:
    """That a path is a file; `what` is how error messages call it.

    Raises:
        UserError: nothing is there, or no file, such as a folder or a pipe.
    """
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder; give a file")
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_file():
        raise UserError(f"{what} {path} is no regular file, but a pipe or a device; give a file")


def require_folder(path: Path) -> None:
    """That a path is a folder that can be written to, or that one can be made there.

    Raises:
        UserError: it, or what it would be in, is a file, or may not be written to.
    """
    found = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not found.is_dir():
        raise UserError(f"cannot write to {path}: {found} is no folder; choose another --output")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: no permission to write to {found}; choose another --output")


def is_full(error: OSError) -> bool:
    """Whether it says that a disk, or someone's share of it, is full: no bad input, and told with an exit code of its own."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the body ends well, and vanishes when it does not. Every process has
    its own."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
