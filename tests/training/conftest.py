"""Images of four colours, and a run of the loop on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CLASSES, write_images
from torch import nn

from gcvit_edge.data import Labels, Preprocessing, class_indices, find_images
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.training.devices import make_accelerator
from gcvit_edge.training.images import LabelledImages
from gcvit_edge.training.loop import Epoch, fit
from gcvit_edge.training.settings import TrainSettings

SMALL = Preprocessing(size=(32, 32), resize=36)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """40 images of 4 classes."""
    root = tmp_path_factory.mktemp("colours") / "images"
    write_images(root, 10, seed=3)
    images = find_images(root, "training")
    return LabelledImages(images, class_indices(images, Labels.of(CLASSES)), SMALL)


@pytest.fixture(scope="session")
def small_model(make_model: Callable[..., GCViT]) -> Callable[..., GCViT]:
    """Makes a network of dim 16 for 32 px and 4 classes; the same one for the same arguments."""
    return lambda **changes: make_model(**{"img_size": 32, "depths": (1, 2, 2, 1), "num_classes": 4} | changes)


@pytest.fixture
def run(colours: LabelledImages, tmp_path: Path) -> Callable[..., tuple[nn.Module, list[Epoch]]]:
    """Runs the loop on the CPU with some settings; `state` is a file's name."""

    def run(model: nn.Module, state: str = "state", *, settings: dict[str, Any], **options: Any) -> tuple[nn.Module, list[Epoch]]:
        settings = {"batch_size": 8, "epochs": 2, "learning_rate": 1e-3} | settings
        data = options.pop("data", colours)
        return fit(model, data, TrainSettings(**settings), make_accelerator("cpu"), state=tmp_path / state, **options)

    return run
