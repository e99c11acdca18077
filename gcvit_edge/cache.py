"""Measurements that take long, kept in a file while they are made, so that an interrupted command goes on where it was.

The file lies in the user's cache and is named by a hash of everything that the measurements follow from, so that a change of
weights, images, recipe or this package starts a new one, and nothing has to be told to resume.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs


def digest(parts: Iterable[bytes | str]) -> str:
    """SHA-256 of all parts with their lengths, hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def sources() -> str:
    """`digest` of this package's Python files."""
    return digest(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))


def cache_file(key: str) -> Path:
    """Where measurements with this key are kept."""
    return Path(platformdirs.user_cache_dir("gcvit-edge")) / "measurements" / f"{key[:32]}.jsonl"


class Measurements:
    """Values by name, one JSON line each, written as soon as it is known; where nothing can be written they are only held."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
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
