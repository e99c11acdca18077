"""A GC ViT so small that every verb runs on it in seconds, and that still tells four colours apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gcvit_edge import create_model
from gcvit_edge.data import Labels, find_images, read_image
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (210, 50, 40), "yellow": (220, 210, 50)}
CLASSES = tuple(COLOURS)
CALIBRATION_IMAGES, EVALUATION_IMAGES = 24, 40
RECIPE = """\
name: tiny
description: limits that a tiny network keeps
calibration: {images: 24}
limits: {max_drop: 50, min_agreement: 0.5}
"""
AUTO_RECIPE = """\
name: auto
description: searches on the 76 images that do not calibrate
calibration: {images: 24}
search: {images: 76, ranked_by: 4}
limits: {max_drop: 6, min_agreement: 0}
"""


@dataclass(frozen=True)
class Tiny:
    """weights: checkpoint in our layout. calib, evaluation: image folders. recipe: file with loose limits. model: the network."""

    weights: Path
    calib: Path
    evaluation: Path
    recipe: Path
    model: GCViT

    def image(self, colour: str) -> Path:
        """An evaluation image of a class."""
        return sorted((self.evaluation / colour).iterdir())[0]


def make_tiny(folder: Path, per_class: int = CALIBRATION_IMAGES // len(CLASSES)) -> Tiny:
    """Writes images and a checkpoint below `folder`; per_class: calibration images.

    The body is random; the head is fitted to the images' features.
    """
    calib, evaluation = folder / "calib", folder / "eval"
    write_images(calib, per_class, seed=1)
    write_images(evaluation, EVALUATION_IMAGES // len(CLASSES), seed=2)
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=len(CLASSES), img_size=64)
    _fit_head(model, calib)
    weights = folder / "tiny.safetensors"
    save_checkpoint(model, describe_model(model, Labels.of(CLASSES)), weights, half=False)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return Tiny(weights, calib, evaluation, recipe, model)


RUINED_LAYER = "stages.2.blocks.0.fc2"


def make_ruined(folder: Path) -> Tiny:
    """The same with one layer that INT8 ruins: of its inputs one is 3000 and of no effect, so that a step is larger than the others.

    No smoothing reaches it, since GELU is between it and the layer before. calib has 100 images, recipe searches.
    """
    calib, evaluation = folder / "calib", folder / "eval"
    write_images(calib, 25, seed=1)
    write_images(evaluation, EVALUATION_IMAGES // len(CLASSES), seed=2)
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=len(CLASSES), img_size=64)
    with torch.no_grad():
        mlp = model.stages[2].blocks[0].mlp
        mlp.fc1.bias[3] = 3000
        mlp.fc2.weight[:, 3] = 0
        mlp.fc2.weight *= 400
    _fit_head(model, calib)
    weights = folder / "ruined.safetensors"
    save_checkpoint(model, describe_model(model, Labels.of(CLASSES)), weights, half=False)
    recipe = folder / "auto.yaml"
    recipe.write_text(AUTO_RECIPE, encoding="utf-8")
    return Tiny(weights, calib, evaluation, recipe, model)


def write_images(root: Path, per_class: int, seed: int) -> None:
    """`root`/colour/number.png: noise around the colour of each class."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            noise = generator.normal(0, 25, (80, 90, 3))
            pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def _fit_head(model: GCViT, calib: Path) -> None:
    """Ridge regression from the head's input to one-hot classes (times 8, for margins like a trained network's)."""
    features: list[torch.Tensor] = []
    hook = model.head.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    images = find_images(calib, "calibration")
    preprocessing = describe_model(model).preprocessing
    with torch.no_grad():
        for file in images.files:
            model(torch.from_numpy(read_image(calib / file, preprocessing)))
        hook.remove()
        x = torch.cat(features).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        y = 8 * torch.nn.functional.one_hot(torch.tensor([CLASSES.index(c) for c in images.classes])).double()
        solution = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
        model.head.fc.weight.copy_(solution[:-1].T)
        model.head.fc.bias.copy_(solution[-1])
