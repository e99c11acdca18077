"""What activations look like where they are rounded: their range, how coarse a step of 8 bits is, and outliers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.quantization.ranges import watched

OUTLIER = 6.0  # standard deviations from the mean; of normal numbers, two in 10^9 are past it
LARGE = 4.0  # times the median channel


@dataclass(frozen=True)
class Activations:
    """Of one place, over all images. low, high: extremes. mean, std: of all values.

    outliers: share of the values past 6 standard deviations. imbalance: magnitude of the largest channel, of the median one.
    large_channels: share of the channels that reach 4 times the median one. step_of_channel: a step of 8 bits, of the magnitude of the
    median channel: at 2, half of the channels are rounded to 0. Channels are those of a layer's weight; of a point, the last axis.
    """

    place: str
    low: float
    high: float
    mean: float
    std: float
    outliers: float
    imbalance: float
    large_channels: float
    step_of_channel: float


class _Sums:
    count = 0
    total = squares = 0.0
    low, high = float("inf"), float("-inf")
    past = 0
    channels: Tensor | None = None


@torch.no_grad()
def activations(network: nn.Module, images: Sequence[NDArray[np.float32]]) -> list[Activations]:
    """Of every place of a deploy form in float, in the order in which it computes, over images (1, C, H, W); runs them twice."""
    sums: dict[str, _Sums] = {}

    def add(place: str, x: Tensor) -> None:
        each = sums.setdefault(place, _Sums())
        each.count += x.numel()
        each.total += float(x.sum(dtype=torch.float64))
        each.squares += float(x.square().sum(dtype=torch.float64))
        low, high = x.aminmax()
        each.low, each.high = min(each.low, float(low)), max(each.high, float(high))
        is_map = x.ndim == 4 and place.endswith((".input", ".output"))
        largest = (x.movedim(1, -1) if is_map else x).abs().flatten(0, -2).amax(0)
        each.channels = largest if each.channels is None else torch.maximum(each.channels, largest)

    def count_outliers(place: str, x: Tensor) -> None:
        each = sums[place]
        each.past += int(((x - _mean(each)).abs() > OUTLIER * _std(each)).sum())

    for note in (add, count_outliers):
        with watched(network, note):
            for image in images:
                network(torch.from_numpy(image))
    return [_describe(place, each) for place, each in sums.items()]


def _mean(each: _Sums) -> float:
    return each.total / each.count


def _std(each: _Sums) -> float:
    return max(each.squares / each.count - _mean(each) ** 2, 0.0) ** 0.5


def _describe(place: str, each: _Sums) -> Activations:
    assert each.channels is not None
    median = max(float(each.channels.median()), 1e-12)
    step = (max(each.high, 0.0) - min(each.low, 0.0)) / 255
    return Activations(
        place, each.low, each.high, _mean(each), _std(each), each.past / each.count, float(each.channels.max()) / median,
        float((each.channels >= LARGE * median).float().mean()), step / median,
    )  # fmt: skip
