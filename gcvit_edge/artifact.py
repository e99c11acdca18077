"""An artifact: one model file of one backend and precision, as it is shipped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["int8", "w4a8", "int4", "fp16", "bf16"]
"""int8: weights and activations. w4a8: weights of linears in 4 bits, groups of 32. int4: the same with activations in float.
fp16, bf16: weights in half precision, computed in float. Files have it in their names."""

Computed = Literal["float", "fp8"] | Precision
"""What a file is in, or a network when it runs. fp8: linears in PyTorch on a GPU, of which there are no files."""

INTEGER_ACTIVATIONS: frozenset[Precision] = frozenset({"int8", "w4a8"})
"""Those that compute in integers; the others unpack their weights and compute in float."""


@dataclass(frozen=True)
class Artifact:
    """path: the main file, which the backend loads. files: all files, the main one first."""

    backend: str
    precision: Computed
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
