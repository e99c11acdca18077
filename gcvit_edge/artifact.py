"""An artifact: one model file of one backend and precision, as it is shipped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Artifact:
    """path: the main file, which the backend loads. files: all files, the main one first."""

    backend: str
    precision: Literal["float", "int8"]
    path: Path
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Short unique name, as used for golden tensors: `onnx.int8`."""
        return f"{self.backend}.{self.precision}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.stat().st_size for file in self.files)
