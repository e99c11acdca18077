"""Channels of activations: what they hold over some calibration images, and the scales that make them alike."""

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.quantization.watch import show, watching

IMAGES = 32  # of the calibration set: channels differ by more than images do

Extremes = tuple[Tensor, Tensor]
"""(lowest, highest) value of every channel, each (C,)"""


def extremes(deployed: nn.Module, layers: Mapping[str, nn.Module], images: Iterable[NDArray]) -> dict[str, Extremes]:
    """Of the outputs of `layers`, by name. images: each (B, C, H, W) float32; the first 32 are used."""
    found: dict[str, Extremes] = {}

    def widen(name: str, x: Tensor, y: Tensor) -> None:
        low, high = rows(y).aminmax(dim=0)
        before = found.get(name, (low, high))
        found[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    with watching(layers, widen):
        for image in islice(images, IMAGES):
            show(deployed, image)
    return found


def highest(ends: Extremes) -> Tensor:
    """(C,): the highest magnitude of every channel."""
    return torch.maximum(-ends[0], ends[1])


def rows(x: Tensor) -> Tensor:
    """(rows, C) of tokens, or of a feature map (B, C, H, W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.ndim == 4 else x


def scales(magnitude: Tensor, opposed: Tensor, strength: float) -> Tensor:
    """(C,): magnitude ** strength / opposed ** (1 - strength), 1 on average in logarithms; 1 for channels that are always 0 or that nothing
    reads, and for all with strength 0, which is off."""
    logarithm = strength * magnitude.log() - (1 - strength) * opposed.log() if strength else torch.zeros_like(magnitude)
    live = (magnitude > 1e-6) & (opposed > 1e-12)
    if not live.any():
        return torch.ones_like(magnitude)
    return torch.where(live, logarithm - logarithm[live].mean(), 0).clamp(-6, 6).exp()
