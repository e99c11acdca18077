"""Measurements that take long, kept in a file while they are made, so that an interrupted command goes on where it was.

The file lies in the user's cache and is named by a hash of everything that the measurements follow from, so that a change of
weights, images, recipe or this package starts a new one, and nothing has to be told to resume.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

_PIECE = 2**20  # bytes of an array at a time: it may be a file that is larger than memory

Part = bytes | str | NDArray[Any]


def digest(parts: Iterable[Part]) -> str:
    """SHA-256 of all parts with their lengths, hexadecimal; of arrays, of their type and shape too."""
    whole = hashlib.sha256()
    for part in parts:
        for data in _pieces(part):
            whole.update(len(data).to_bytes(8, "little"))
            whole.update(data)
    return whole.hexdigest()


def _pieces(part: Part) -> Iterator[bytes]:
    if isinstance(part, np.ndarray):
        yield f"{part.dtype.str} {part.shape}".encode()
        rows = np.atleast_1d(part)
        count = max(1, _PIECE // max(1, rows[:1].nbytes))
        yield from (rows[first : first + count].tobytes() for first in range(0, len(rows), count))
    else:
        yield part.encode() if isinstance(part, str) else part


def sources() -> str:
    """`digest` of this package's Python files."""
    return digest(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))


def cache_file(key: str) -> Path:
    """Where measurements with this key are kept."""
    return Path(platformdirs.user_cache_dir("gcvit-edge")) / "measurements" / f"{key[:32]}.jsonl"


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text(encoding="utf-8").splitlines()
    return []


class Measurements:
    """Values by name, one JSON line each, written as soon as it is known; where nothing can be read or written they are only held."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        for line in _lines(file):
            try:
                name, value = json.loads(line)
            except ValueError:  # the end of a file whose writer was killed
                continue
            self.values[name] = value

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of this name; measured now unless it was before. It must be the same after JSON."""
        if name not in self.values:
            self.values[name] = measure()
            self._write(f"\n{json.dumps([name, self.values[name]], allow_nan=False)}")  # newline first: the last line may be half of one
        return self.values[name]

    def _write(self, text: str) -> None:
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(text)
