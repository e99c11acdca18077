"""Quantized artifacts of a tiny network, by a recipe of the package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import load_backend
from gcvit_edge.lower import lower_quantized, roundings
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

IMAGES = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)


def make_quantized(made_once: Callable[..., Path], make_model: Callable[..., GCViT], name: str, backend: str) -> Artifact:
    """The artifact of a network of 32 px and 4 classes by the recipe `name`, calibrated on `IMAGES`."""
    recipe = parse_recipe(recipe_text(name), name)

    def make(folder: Path) -> None:
        model = make_model(img_size=32, depths=(1, 2, 2, 1), num_classes=4).eval()
        calibrated = calibrate(model, recipe, lambda: iter(IMAGES[:, None]), roundings(recipe, [backend]))
        lower_quantized(backend, calibrated, describe_model(model), recipe, folder)

    folder = made_once(f"{backend}.{name}", make)
    path = folder / load_backend(backend).ARTIFACT.format(precision=recipe.precision)
    return Artifact(backend, recipe.precision, path, (path, *sorted(set(folder.iterdir()) - {path})))
