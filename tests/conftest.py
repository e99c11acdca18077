"""Fixtures for every part of the suite: reference data, a small network in memory, and bundles of another for devices."""

import fcntl
import importlib.metadata
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from quantized import make_quantized
from remembered import forget, remember
from searched import make_searched
from tiny import Tiny, make_ruined
from torch import nn

from gcvit_edge import export_float, open_bundle
from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.gcvit import GCViT, LayerScale

# by default an example may take 200 ms, which it does not where other tests run beside it
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

# with two, as many processes of tests as CPUs would wait for each other: threads spin, and a suite takes twice as long
torch.set_num_threads(1)

# in the background of a script, whose shell has it ignored there, tests of Ctrl-C would wait for one for ever
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: reference data that is not part of the project."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        reason = "needs the folder shared beside the checkout: reference data that is not part of the project"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(name, make)` is a folder that `make(folder)` has filled once for all processes of a run, which wait for it. It is for
    reading: a test that changes something copies it before."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all processes

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done, lock = (root / "once" / f"{name}{ending}" for ending in ("", ".done", ".lock"))
        lock.parent.mkdir(exist_ok=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture(scope="session", autouse=True)
def artifacts_once(made_once: Callable[..., Path]) -> Iterator[None]:
    """Of the same network, unless a test asks for `artifacts_anew`."""
    with pytest.MonkeyPatch.context() as patch:
        remember(patch, made_once)
        yield


@pytest.fixture(scope="module")
def artifacts_anew(artifacts_once: None) -> Iterator[None]:
    """Where making them is what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference outputs of the two independent implementations, NVlabs' and timm's."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def onnxruntime_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if ONNX Runtime were installed as the distribution `onnxruntime-gpu` alone; its version."""
    folder = tmp_path / "packages" / "onnxruntime_gpu-9.8.7.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.8.7\n")
    (folder / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(folder.parent)
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return "9.8.7"


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has files with the names of what our processes import; to import one is an error."""
    folder = tmp_path / "current"
    folder.mkdir()
    for name in ("gcvit_edge", "numpy", "onnx", "pip", "profile"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(folder)


def _perturb(model: GCViT) -> GCViT:
    """Randomises what initialisation leaves at 0, at 1 or tiny, so that no folded term can be lost unnoticed."""
    generator = torch.Generator().manual_seed(1)

    def add_noise(tensor: torch.Tensor, std: float) -> None:
        tensor.add_(torch.randn(tensor.shape, generator=generator) * std)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "relative_position_bias_table")):
                add_noise(parameter, 0.3)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                add_noise(module.weight, 0.3)
            elif isinstance(module, nn.Linear):
                add_noise(module.weight, module.in_features**-0.5)
            elif isinstance(module, LayerScale):
                add_noise(module.gamma, 0.5)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GCViT]:
    """Makes a GC ViT of dim 16 for 64 px and 8 classes (windows 2, 2, 4, 2) with weights that are all far from trivial.

    The arguments are those of `create_model` and change that shape.
    """

    def make(name: str = "gcvit_xxtiny", **changes: Any) -> GCViT:
        torch.manual_seed(0)
        small = {"dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 8, "img_size": 64}
        return _perturb(create_model(name, **(small if name == "gcvit_xxtiny" else {}) | changes))

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., GCViT]) -> GCViT:
    """The network of `make_model` as it is."""
    return make_model()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of one block a stage."""
    path = tmp_path_factory.mktemp("weights") / "one_block.safetensors"
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    save_checkpoint(model, describe_model(model), path, half=False)
    return path


@pytest.fixture(scope="session")
def bundle(weights: Path, made_once: Callable[..., Path]) -> Bundle:
    """Its ONNX model: made in a few seconds."""
    return exported(weights, made_once, "onnx")


@pytest.fixture(scope="session")
def pte_bundle(weights: Path, made_once: Callable[..., Path]) -> Bundle:
    """Its .pte, for devices, and its ONNX model: every target can run one of them."""
    return exported(weights, made_once, "executorch", "onnx")


def exported(weights: Path, made_once: Callable[..., Path], *backends: str) -> Bundle:
    def make(folder: Path) -> None:
        export_float(weights=str(weights), backends=backends, output=folder / "bundle", threads=1)

    return open_bundle(made_once("-".join(backends), make) / "bundle")


@pytest.fixture(scope="session")
def quantized(made_once: Callable[..., Path], make_model: Callable[..., GCViT]) -> Callable[[str, str], Artifact]:
    """`quantized(recipe, backend)` is a quantized artifact of a network of 32 px and 4 classes."""
    return lambda recipe, backend: make_quantized(made_once, make_model, recipe, backend)


@pytest.fixture(scope="session")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny network with one layer that INT8 ruins."""
    return make_ruined(tmp_path_factory.mktemp("ruined"))


@pytest.fixture(scope="session")
def auto(ruined: Tiny, made_once: Callable[..., Path]) -> Bundle:
    """What a search for that layer has found; beside it, `cache` has all that was measured for it."""
    return open_bundle(made_once("auto", lambda folder: make_searched(ruined, folder)) / "bundle")
