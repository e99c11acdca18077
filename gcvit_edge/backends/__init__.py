"""Backends: one module a runtime; the file name is the registry.

A backend is a module with the members of `Backend`. It turns a trained network into its runtime's graph, quantizes that
graph with its runtime's own quantizer, writes it to files, and loads such files to run them. Backends import neither each
other nor the command line, and everything heavy inside functions that need it, so that loading an artifact does not import
the exporter.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

import gcvit_edge.backends as _package
from gcvit_edge.recipe import Operator, Recipe
from gcvit_edge.registry import load_module, module_names

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.model.info import ModelInfo

Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(1, C, H, W) float32 image -> (1, num_classes) float32 logits."""


class Backend(Protocol):
    """What a backend module has. `graph` is whatever the backend's own tools work on."""

    INTEGER_OPERATORS: frozenset[Operator]
    """What this runtime can compute in integers; operators that a recipe wants beyond these stay in float."""

    ARTIFACT: str
    """Path of the main file in a bundle, with `{precision}`."""

    RUNTIME: str
    """Module that runs artifacts; imported before loading is timed."""

    PACKAGES: tuple[str, ...]
    """Distributions whose versions decide what the artifact is."""

    def capture(self, model: "GCViT", info: "ModelInfo") -> Any:
        """The float graph of the backend's deploy form, batch 1."""
        ...

    def quantize(self, graph: Any, recipe: Recipe, images: Iterable[NDArray[np.float32]]) -> Any:
        """A quantized copy of a captured graph; `images` are calibration inputs (1, C, H, W). `graph` is not changed."""
        ...

    def save(self, graph: Any, path: Path, info: "ModelInfo") -> list[Path]:
        """Writes a graph, with labels and preprocessing where the format has a place for them; returns the files made."""
        ...

    def load(self, path: Path, threads: int) -> Runner:
        """A runner of a saved artifact on `threads` CPU threads."""
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
