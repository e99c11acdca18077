"""Ranges of activations: the inputs and outputs of every linear and convolution of a deploy form, and its points.

How the range of a place follows from what was seen there (`RangeMethod`):

- minmax: the extremes.
- average: the mean over images of each image's extremes (NNCF's default).
- percentile: what 99.99 % of the values lie in.
- mse: the range of least squared error of rounding, each end searched for itself, down to a fifth of what was seen. `int8_ptq` has it:
  where all scales are static, 2 to 4 dB better than the extremes, the more the rarer a calibration image is (benchmarks/NOTES.md).
- entropy: the range whose rounded distribution has the least Kullback-Leibler divergence (TensorRT, "8-bit inference", 2017).

The last three work on a histogram of 2,048 bins, which takes a second pass over the images.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.watch import show, watching
from gcvit_edge.recipe import RangeMethod

Ranges = dict[str, tuple[float, float]]
"""(lowest, highest) value by place: "LAYER.input", "LAYER.output", or the name of a point. The same for every `Form`."""

Images = Callable[[], Iterator[NDArray[np.float32]]]
"""Gives the calibration images from the first on, each (B, C, H, W) float32, as often as it is called."""

Histogram = NDArray[np.float64]

_BINS = 2048
_PERCENTILE = 99.99
_LEVELS = 256
_PARTS = np.linspace(1, 0.2, 41)  # of the full range to a side of zero, that mse looks at
_COMMON_PARTS = np.linspace(1, 0.3, 36)  # of the full range to both sides, that entropy looks at


@torch.no_grad()
def observe(deployed: nn.Module, images: Images, method: RangeMethod = "minmax", places: Collection[str] | None = None) -> Ranges:
    """The ranges of these places of a deploy form (None: all) over the images."""
    if places is not None and not places:
        return {}
    extremes: dict[str, list[tuple[float, float]]] = {}

    def note(place: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.aminmax())
        extremes.setdefault(place, []).append((low, high))

    with watched(deployed, note, places):
        for image in images():
            show(deployed, image)
    if method == "average":
        return {place: (float(np.mean(ends, 0)[0]), float(np.mean(ends, 0)[1])) for place, ends in extremes.items()}
    ranges = {place: (min(low for low, _ in ends), max(high for _, high in ends)) for place, ends in extremes.items()}
    if method == "minmax":
        return ranges
    choose = {"percentile": _percentile, "mse": _least_error, "entropy": _least_divergence}[method]
    return {place: choose(histogram, *ranges[place]) for place, histogram in _histograms(deployed, images, ranges).items()}


def watched(
    deployed: nn.Module, note: Callable[[str, Tensor], None], places: Collection[str] | None = None
) -> AbstractContextManager[None]:
    """Inside, `note(place, activations)` is called for each of these places (None: for every one) whenever the network runs."""

    def see(name: str, x: Tensor, y: Tensor) -> None:
        for place, activations in [(name, y)] if name in points else [(f"{name}.input", x), (f"{name}.output", y)]:
            if places is None or place in places:
                note(place, activations)

    modules = {name: each for name, each in deployed.named_modules() if isinstance(each, Point | nn.Linear | nn.Conv2d)}
    points = {name for name, each in modules.items() if isinstance(each, Point)}
    return watching(modules, see)


def _histograms(deployed: nn.Module, images: Images, ranges: Ranges) -> dict[str, Histogram]:
    """Counts (2048,) of the values at every place, from its lowest to its highest. Of all values, not a sample: places that hold the same
    values must get the same range, since XNNPACK moves integers only without changing them, and OpenVINO rounds once for q, k and v."""
    counts = {place: torch.zeros(_BINS, dtype=torch.float64) for place in ranges}

    def count(place: str, x: Tensor) -> None:
        low, high = ranges[place]
        bins = ((x - low) * (_BINS / (high - low if high > low else 1))).int().clamp_(max=_BINS - 1)
        counts[place] += torch.bincount(bins.flatten(), minlength=_BINS)  # in half of the time that torch.histc takes

    with watched(deployed, count, ranges):
        for image in images():
            show(deployed, image)
    return {place: each.numpy() for place, each in counts.items()}


def _percentile(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    cumulated = np.cumsum(histogram) / histogram.sum()
    tail = (1 - _PERCENTILE / 100) / 2
    first, last = np.searchsorted(cumulated, (tail, 1 - tail))
    width = (high - low) / _BINS
    return low + first * width, low + (last + 1) * width


def _least_error(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """Each end is searched for itself, in turn: outliers are often on one side, and most values of GELU at the other."""
    values = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS

    def least(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> int:
        squares = np.square(_rounded(values, lows[:, None], highs[:, None]) - values)
        return int(np.argmin([histogram @ each for each in squares]))  # of equals the first, which is the widest

    lows, highs = low * _PARTS, high * _PARTS
    first, last = 0, 0
    for _ in range(2):
        last = least(lows[first : first + 1], highs)
        first = least(lows, highs[last : last + 1])
    return float(lows[first]), float(highs[last])


def _least_divergence(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    values = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS

    def divergence(ends: tuple[float, float]) -> float:
        inside = np.clip(values, *ends)
        first, last = np.flatnonzero(values == inside)[[0, -1]]
        clipped = np.bincount(np.arange(_BINS).clip(first, last), histogram, _BINS)  # what is outside counts at the ends
        levels = np.searchsorted(np.unique(_rounded(inside, *ends)), _rounded(inside, *ends))
        kept = histogram * (values == inside)
        level_counts, level_bins = np.bincount(levels, kept), np.bincount(levels, kept > 0)
        spread = np.where(kept > 0, (level_counts / np.maximum(level_bins, 1))[levels], 0)
        p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-12)
        live = p > 0
        return float((p[live] * np.log(p[live] / np.maximum(q[live], 1e-9))).sum())

    def narrowed(part: float) -> tuple[float, float]:  # an end on the far side of zero stays: zero is in every range
        return float(low if low > 0 else low * part), float(high if high < 0 else high * part)

    # one factor for both ends: each for itself gave 19 dB
    return min((ends for ends in map(narrowed, _COMMON_PARTS) if ((values >= ends[0]) & (values <= ends[1])).any()), key=divergence)


def _rounded(values: Histogram, low: float | NDArray[np.float64], high: float | NDArray[np.float64]) -> Histogram:
    """Values (N,) in integers and back; of several ranges, whose ends are (M, 1) or (1, 1), each (M, N)."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = np.maximum((high - low) / (_LEVELS - 1), 1e-12)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, _LEVELS - 1) - zero) * scale
