"""From a trained network to one artifact of one backend: deploy form, quantization, export."""

from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import Backend, load_backend
from gcvit_edge.model.info import ModelInfo, read_config
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.recipe import Operator, Recipe

if TYPE_CHECKING:
    from torch import nn

    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.quantization.calibrate import Calibrated


def lower_float(name: str, model: "GCViT", info: ModelInfo, folder: Path) -> Artifact:
    """Writes the float artifact of backend `name` below `folder`, where a bundle has it."""
    from gcvit_edge.model.deploy import deploy, rewrite

    backend = load_backend(name)
    return _save(name, rewrite(deploy(model), backend.form(frozenset())), "float", info, folder)


def lower_quantized(name: str, calibrated: "Calibrated", info: ModelInfo, recipe: Recipe, folder: Path) -> Artifact:
    """Writes the artifact of backend `name` that `recipe` asks for."""
    from gcvit_edge.model.deploy import rewrite
    from gcvit_edge.quantization.scheme import quantize

    backend = load_backend(name)
    operators, arithmetic = rounding(recipe, backend)
    deployed = rewrite(calibrated.network, backend.form(operators))
    quantized = quantize(deployed, operators, arithmetic, calibrated.ranges, recipe.precision)
    return _save(name, quantized, recipe.precision, info, folder)


def integer_operators(recipe: Recipe, backend: Backend) -> frozenset[Operator]:
    """Of what a recipe wants in integers, what the backend's runtime has kernels for."""
    return frozenset(recipe.operators) & backend.INTEGER_OPERATORS


def rounding(recipe: Recipe, backend: Backend) -> tuple[frozenset[Operator], Arithmetic]:
    """What the backend's runtime rounds of a recipe, and how."""
    operators = integer_operators(recipe, backend)
    return operators, backend.arithmetic(operators)


def _save(name: str, network: "nn.Module", precision: str, info: ModelInfo, folder: Path) -> Artifact:
    import torch

    backend = load_backend(name)
    path = folder / backend.ARTIFACT.format(precision=precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = read_config(info.config)
    example = torch.zeros(1, config.in_chans, *config.img_size)
    files = backend.save(backend.capture(network, example), path, info)
    return Artifact(name, precision, path, tuple(files))  # type: ignore[arg-type]
