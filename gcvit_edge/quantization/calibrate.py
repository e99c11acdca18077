"""What is found out about a network from calibration images, once for all backends: weights to quantize, and ranges."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gcvit_edge.model.deploy import deploy
from gcvit_edge.quantization.centering import centre
from gcvit_edge.quantization.equalization import equalize
from gcvit_edge.quantization.integers import GroupedWeight, IntegerWeight
from gcvit_edge.quantization.ranges import Images, Ranges, observe
from gcvit_edge.quantization.rounding import correct_biases, reconstruct
from gcvit_edge.quantization.scheme import Rounding, in_four_bits, places_with_ranges
from gcvit_edge.quantization.smoothing import smooth
from gcvit_edge.recipe import Recipe

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT


@dataclass(frozen=True)
class Calibrated:
    """A deploy form as `Form()` writes it, whose weights are to be rounded as they are, and the ranges of its activations."""

    network: nn.Module
    ranges: Ranges


def calibrate(model: "GCViT", recipe: Recipe, images: Images, runtimes: Sequence[Rounding] | None = None) -> Calibrated:
    """Prepares the deploy form of `model` for `recipe`; `model` is not changed. runtimes: only ranges that one of them rounds with are
    looked for, which saves time (None: all)."""
    network = deploy(model)
    if recipe.centering:
        centre(network, images())
    if recipe.smoothing:
        smooth(network, images())
    if recipe.equalization:
        equalize(network, images())

    def small(name: str, channels: int) -> bool:
        return in_four_bits(name, channels, recipe.precision)

    if recipe.rounding == "adaptive":
        reconstruct(network, images, lambda name: small(name, network.get_submodule(name).in_features))  # type: ignore[arg-type]
    if recipe.bias_correction:
        correct_biases(network, images, lambda name, w: (GroupedWeight if small(name, w.shape[1]) else IntegerWeight)(w)())
    places = None if runtimes is None else places_with_ranges(network, runtimes, recipe.precision)
    ranges = observe(network, images, recipe.calibration.ranges, places)
    if recipe.calibration.unit_softmax:
        ranges |= dict.fromkeys((place for place in ranges if place.endswith("attention.softmax")), (0.0, 1.0))
    return Calibrated(network, ranges)
