"""What is found out about a network from calibration images, once for all backends: weights to quantize, and ranges."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gcvit_edge.measurement.accuracy import check_finite
from gcvit_edge.model.deploy import deploy
from gcvit_edge.quantization.centering import centre
from gcvit_edge.quantization.equalization import equalize, equalize_streams
from gcvit_edge.quantization.keep import kept_layers
from gcvit_edge.quantization.ranges import Images, Ranges, observe
from gcvit_edge.quantization.rounding import correct_biases, reconstruct
from gcvit_edge.quantization.scheme import Rounding, places_with_ranges, weight_grids
from gcvit_edge.quantization.sensitivity import logits
from gcvit_edge.quantization.sequential import reconstruct_in_turn
from gcvit_edge.quantization.smoothing import smooth
from gcvit_edge.recipe import Recipe

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT

_CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Calibrated:
    """What all backends are made from.

    network: the float deploy form, as `Form()` writes it, its channels made fit for INT8; its answers are the model's. ranges: of its
    activations. fitted: parameters that are better rounded than the network's own of these names, which are for layers that stay float.
    """

    network: nn.Module
    ranges: Ranges
    fitted: Mapping[str, Tensor] = field(default_factory=dict)

    def to_round(self, keep: Collection[str] = ()) -> nn.Module:
        """The network, not to be changed, with what was fitted in all layers but those of `keep`."""
        if not self.fitted:
            return self.network
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, value in self.fitted.items():
                if name.rpartition(".")[0] not in keep:
                    network.get_parameter(name).copy_(value)
        return network


def calibrate(model: "GCViT", recipe: Recipe, images: Images, runtimes: Sequence[Rounding] | None = None) -> Calibrated:
    """Prepares the deploy form of `model` for `recipe`; `model` is not changed. runtimes: only ranges that one of them rounds with are
    looked for, which saves time (None: all).

    Raises:
        CheckFailed: activations of the float network overflow.
    """
    network = deploy(model)
    check_finite(logits(network, list(islice(images(), _CHECKED_IMAGES))))
    if recipe.centering:
        centre(network, images())
    if recipe.smoothing:
        smooth(network, images())
    if recipe.equalization:
        equalize(network, images())
        if "residual" in recipe.operators:
            equalize_streams(network, images())

    rounded, grids = copy.deepcopy(network), weight_grids(network, recipe.operators, recipe.precision)
    if recipe.rounding == "adaptive":
        reconstruct(rounded, images, grids)
    if recipe.rounding == "sequential":
        kept = kept_layers(network, recipe.keep_float)  # which hand on no error
        reconstruct_in_turn(rounded, images, {name: grid for name, grid in grids.items() if name not in kept})
    if recipe.bias_correction:
        correct_biases(rounded, images, grids)
    fitted = {name: value.data for name, value in rounded.named_parameters() if not torch.equal(value, network.get_parameter(name))}
    places = None if runtimes is None else places_with_ranges(network, runtimes, recipe.precision)
    ranges = observe(rounded, images, recipe.calibration.ranges, places)
    if recipe.calibration.unit_softmax:
        ranges |= dict.fromkeys((place for place in ranges if place.endswith("attention.softmax")), (0.0, 1.0))
    return Calibrated(network, ranges, fitted)
