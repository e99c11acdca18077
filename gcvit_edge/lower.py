"""From a trained network to one artifact of one backend: deploy form, quantization, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import Backend, load_backend
from gcvit_edge.model.info import ModelInfo, read_config
from gcvit_edge.recipe import Operator, Recipe

if TYPE_CHECKING:
    from torch import nn

    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.quantization.calibrate import Calibrated
    from gcvit_edge.quantization.scheme import Rounding


def lower_float(name: str, model: "GCViT", info: ModelInfo, folder: Path) -> Artifact:
    """Writes the float artifact of backend `name` below `folder`, where a bundle has it."""
    from gcvit_edge.model.deploy import deploy, rewrite

    backend = load_backend(name)
    return lower_network(name, rewrite(deploy(model), backend.form(frozenset())), "float", info, folder)


def lower_quantized(name: str, calibrated: "Calibrated", info: ModelInfo, recipe: Recipe, folder: Path) -> Artifact:
    """Writes the artifact of backend `name` that `recipe` asks for."""
    return lower_network(name, simulate(name, calibrated, recipe), recipe.precision, info, folder)


def simulate(name: str, calibrated: "Calibrated", recipe: Recipe) -> "nn.Module":
    """What backend `name` exports for `recipe`: its way of writing the deploy form, in its integers, as PyTorch computes them."""
    from gcvit_edge.model.deploy import rewrite
    from gcvit_edge.quantization.keep import kept_layers
    from gcvit_edge.quantization.scheme import quantize

    runtime = rounding(recipe, load_backend(name))
    keep = kept_layers(calibrated.network, recipe.keep_float)
    network = rewrite(calibrated.to_round(keep), runtime.form)
    return quantize(network, runtime.operators, runtime.arithmetic, calibrated.ranges, recipe.precision, keep)


def written(name: str, calibrated: "Calibrated", recipe: Recipe) -> "nn.Module":
    """The same in float."""
    from gcvit_edge.model.deploy import rewrite

    return rewrite(calibrated.network, rounding(recipe, load_backend(name)).form)


def integer_operators(recipe: Recipe, backend: Backend) -> frozenset[Operator]:
    """Of what a recipe wants in integers, what the backend's runtime has kernels for."""
    return frozenset(recipe.operators) & backend.INTEGER_OPERATORS


def rounding(recipe: Recipe, backend: Backend) -> "Rounding":
    """What the backend's runtime rounds of a recipe, and how."""
    from gcvit_edge.quantization.scheme import Rounding

    operators = integer_operators(recipe, backend)
    return Rounding(operators, backend.arithmetic(operators, recipe.x86), backend.form(operators))


def roundings(recipe: Recipe, names: Sequence[str]) -> "list[Rounding]":
    """The same of each of these backends."""
    return [rounding(recipe, load_backend(name)) for name in names]


def lower_network(name: str, network: "nn.Module", precision: str, info: ModelInfo, folder: Path) -> Artifact:
    """Writes the artifact of a network that is written and quantized for backend `name`."""
    import torch

    from gcvit_edge.backends._fast_export import fast_export

    backend = load_backend(name)
    path = folder / backend.ARTIFACT.format(precision=precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = read_config(info.config)
    example = torch.zeros(1, config.in_chans, *config.img_size)
    with fast_export():
        files = backend.save(backend.capture(network, example), path, info)
    return Artifact(name, precision, path, tuple(files))  # type: ignore[arg-type]
