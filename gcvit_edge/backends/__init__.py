"""Backends: one module a runtime; the file name is the registry.

A backend is a module with the members of `Backend`. It says how its runtime wants the deploy form written and how it computes in
integers, exports such a network to its files, and loads files to run them. Quantization itself is the same for all and happens
before, see `gcvit_edge.quantization`. Backends import neither each other nor the command line, and everything heavy inside functions
that need it, so that loading an artifact does not import the exporter.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

import gcvit_edge.backends as _package
from gcvit_edge.artifact import Precision
from gcvit_edge.measurement.operators import TimedOperator
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.recipe import X86, Operator
from gcvit_edge.registry import load_module, module_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gcvit_edge.model.info import ModelInfo

Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(1, C, H, W) float32 image -> (1, num_classes) float32 logits."""


class Backend(Protocol):
    """What a backend module has. `graph` is whatever the backend's own tools work on."""

    INTEGER_OPERATORS: frozenset[Operator]
    """What this runtime can compute in integers; operators that a recipe wants beyond these stay in float."""

    PRECISIONS: frozenset[Precision]
    """What this backend can make."""

    ARTIFACT: str
    """Path of the main file in a bundle, with `{precision}`."""

    PACKAGES: tuple[str, ...]
    """Distributions whose versions decide what the artifact is."""

    def form(self, operators: frozenset[Operator]) -> Form:
        """How this runtime wants the deploy form written if these operators are in integers."""
        ...

    def arithmetic(self, operators: frozenset[Operator], x86: X86) -> Arithmetic:
        """How this runtime computes if these operators are in integers, fastest on such x86 CPUs."""
        ...

    def capture(self, deployed: "nn.Module", example: "Tensor") -> Any:
        """The runtime's graph of a deploy form, quantized or not; `example` is an input, whose shape (1, C, H, W) becomes fixed."""
        ...

    def save(self, graph: Any, path: Path, info: "ModelInfo") -> list[Path]:
        """Writes a graph, with labels and preprocessing where the format has a place for them; returns the files made."""
        ...

    def import_runtime(self) -> str:
        """Imports what runs artifacts, and nothing that makes them, before loading is timed; gives the name of its distribution."""
        ...

    def load(self, path: Path, threads: int) -> Runner:
        """A runner of a saved artifact on `threads` CPU threads."""
        ...

    def profile(self, path: Path, threads: int, image: NDArray[np.float32], runs: int) -> tuple[list[TimedOperator], int | None]:
        """The operators of a saved artifact as the runtime runs and times them, and its delegate calls if it has delegates."""
        ...

    def requirements(self, path: Path) -> dict[str, Any]:
        """What a device must have to run the artifact: minimum runtime version, and operators or delegates."""
        ...


def backend_names() -> list[str]:
    """All backends, installed or not."""
    return module_names(_package)


def load_backend(name: str) -> Backend:
    """The backend module `name`.

    Raises:
        UserError: unknown name (the message names the nearest one).
    """
    return cast(Backend, load_module(_package, "backend", name))


def package_version(name: str) -> str:
    """Version of a distribution, or of the one that has a module of this name: ONNX Runtime's for GPUs is `onnxruntime-gpu`.

    Raises:
        PackageNotFoundError: there is neither.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        if name not in (distributions := packages_distributions()):
            raise
        return version(distributions[name][0])
