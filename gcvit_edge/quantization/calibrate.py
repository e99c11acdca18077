"""What is found out about a network from calibration images, once for all backends: weights to quantize, and ranges."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gcvit_edge.model.deploy import deploy
from gcvit_edge.quantization.ranges import Images, Ranges, observe
from gcvit_edge.quantization.smoothing import smooth
from gcvit_edge.recipe import Recipe

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT

@dataclass(frozen=True)
class Calibrated:
    """A deploy form as `Form()` writes it, whose weights are to be rounded as they are, and the ranges of its activations."""

    network: nn.Module
    ranges: Ranges


def calibrate(model: "GCViT", recipe: Recipe, images: Images) -> Calibrated:
    """Prepares the deploy form of `model` for `recipe`; `model` is not changed."""
    network = deploy(model)
    if recipe.smoothing:
        smooth(network, images())
    return Calibrated(network, observe(network, images, recipe.calibration.ranges))
