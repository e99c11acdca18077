"""Exporters take most of a run's time, and the same network gives the same files (backends/test_contract.py): each is made once."""

import hashlib
import io
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gcvit_edge import beside
from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import load_backend
from gcvit_edge.lower import lower_float, lower_network
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import ModelInfo

make = lower_network  # the real one


def remember(patch: pytest.MonkeyPatch, made_once: Callable[..., Path]) -> None:
    """What this or another process of the run has made of the same network before is copied, and float artifacts are no work for another
    process then, which is tested in test_beside.py."""

    def lower_network(name: str, network: torch.nn.Module, precision: str, info: ModelInfo, folder: Path) -> Artifact:
        what = f"{name}.{precision}.{digest(network, info)}"
        found = made_once(what, lambda place: make(name, network, precision, info, place))
        shutil.copytree(found, folder, dirs_exist_ok=True)
        files = [folder / file.relative_to(found) for file in sorted(found.rglob("*")) if file.is_file()]
        main = folder / load_backend(name).ARTIFACT.format(precision=precision)
        return Artifact(name, precision, main, (main, *(file for file in files if file != main)))  # type: ignore[arg-type]

    patch.setattr("gcvit_edge.lower.lower_network", lower_network)
    patch.setattr("gcvit_edge.pipeline.FloatArtifacts", FloatArtifacts)


def forget(patch: pytest.MonkeyPatch) -> None:
    """Everything is made anew, as for users."""
    patch.setattr("gcvit_edge.lower.lower_network", make)
    patch.setattr("gcvit_edge.pipeline.FloatArtifacts", beside.FloatArtifacts)


class FloatArtifacts:
    """As gcvit_edge.beside has it, in this process."""

    def __init__(self, model: GCViT, info: ModelInfo, names: Sequence[str], folder: Path, work: Path) -> None:
        self._make = lambda: [lower_float(name, model, info, folder) for name in names]

    def wait(self) -> list[Artifact]:
        return self._make()

    def close(self) -> None:
        pass


def digest(*objects: object) -> str:
    """Of all that they are: structure, attributes, the bits of tensors. Of what was put together otherwise it may differ nevertheless."""
    pickled = io.BytesIO()
    _Pickler(pickled).dump(objects)
    return hashlib.sha256(pickled.getbuffer()).hexdigest()[:32]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        """A tensor's own has addresses."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return bytes, (repr((type(value), value.dtype, value.shape, value.requires_grad)).encode() + content,)
