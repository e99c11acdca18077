"""Writing that is interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def interrupted_writing() -> Iterator[None]:
    """Ctrl-C comes after the first character that `Path.write_text` writes, and ends the body."""

    def write_text(path: Path, text: str, *_: Any) -> int:
        path.write_bytes(text[:1].encode())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(KeyboardInterrupt):
            yield
