"""Smoothing: channels with large activations are made smaller and the weights that read them larger, exactly, so that one scale a
tensor fits all channels (SmoothQuant, arXiv:2211.10438, equation 4; RepQ-ViT's reparametrization of norms, arXiv:2212.08254, is
its strength of 1; cross-layer equalization, arXiv:1906.04721, is the same between two linears).

GC ViT allows it wherever something linear writes what an integer layer reads, at no cost when it runs:

- a norm before q, k and v, or before fc1, or the last one before the head: its weight;
- the gate of a Fused-MBConv before the pointwise convolution: a factor of each channel's gate;
- a downsampler's feature map before its reduction: the affine of the norm, the depthwise weights, the pointwise outputs;
- v before proj.

The strength is searched at each place, off included, for the least error of what the layers behind it compute in INT8.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.model.deploy import Attention, Block, Downsample, MBConv, RMSNorm
from gcvit_edge.model.deploy.folding import scale_rows
from gcvit_edge.quantization.channels import IMAGES, rows, scales
from gcvit_edge.quantization.integers import Affine, IntegerWeight
from gcvit_edge.quantization.watch import show, watching

STRENGTHS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
ROWS = 2048  # of activations that a strength is judged by


@dataclass(frozen=True)
class Place:
    """Activations that can be scaled by channel. readers: the layers that read them, whose weights take the scale back.

    shrink: divides what writes the activations by (C,).
    """

    name: str
    readers: Sequence[nn.Linear | nn.Conv2d]
    shrink: Callable[[Tensor], None]


def places(deployed: nn.Module) -> Iterator[Place]:
    """All places of a deploy form, in the order of the network."""
    for name, module in deployed.named_modules():
        if isinstance(module, Downsample):
            yield Place(f"{name}.reduction", [module.reduction], _downsample(module))
        elif isinstance(module, MBConv):
            yield Place(f"{name}.pointwise", [module.pointwise], lambda scale, module=module: _divide(module.gain.value, scale))
        elif isinstance(module, Block):
            attention = module.attention
            yield Place(f"{name}.norm1", [each for each in (attention.q, attention.k, attention.v) if each], _norm(module.norm1))
            yield Place(f"{name}.attention.proj", [attention.proj], _value(attention))
            yield Place(f"{name}.norm2", [module.fc1], _norm(module.norm2))
    yield Place("norm", [deployed.get_submodule("head")], _norm(deployed.get_submodule("norm")))  # type: ignore[list-item]


@torch.no_grad()
def smooth(deployed: nn.Module, images: Iterable[NDArray[np.float32]], strengths: Sequence[float] = STRENGTHS) -> dict[str, float]:
    """Scales the channels of a deploy form in place, as `Form()` writes it; gives the strength that was chosen at each place.

    images: each (B, C, H, W), of the calibration set; the first 32 are used. The logits stay what they are, up to rounding.
    """
    images = list(islice(images, IMAGES))
    found = list(places(deployed))
    seen = _observed(deployed, found, images)
    chosen = {}
    for place in found:
        weights = [_matrix(reader.weight) for reader in place.readers]
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        some, highest = seen.rows[place.name], seen.highest[place.name]
        errors = [_error(some, weights, scales(highest, largest, strength)) for strength in strengths]
        best = int(np.argmin(errors))
        chosen[place.name] = strengths[best]
        scale = scales(highest, largest, strengths[best])
        place.shrink(scale)
        for reader in place.readers:
            reader.weight *= scale if isinstance(reader, nn.Linear) else scale[:, None, None]
    return chosen


def _error(activations: Tensor, weights: Sequence[Tensor], scale: Tensor) -> float:
    """Squared error of the products of activations (rows, C) with weights (out, C) in INT8, with channels divided by `scale`."""
    shrunk = activations / scale
    rounded = Affine.of_range(float(shrunk.min()), float(shrunk.max()), "int8").round_trip(shrunk)
    return sum(float(F.mse_loss(rounded @ IntegerWeight(w * scale)().T, activations @ w.T, reduction="sum")) for w in weights)


@dataclass(frozen=True)
class _Seen:
    """By name of a place: rows (rows, C) of its activations, and the highest magnitude (C,) of every channel."""

    rows: dict[str, Tensor]
    highest: dict[str, Tensor]


def _observed(deployed: nn.Module, found: Sequence[Place], images: Sequence[NDArray[np.float32]]) -> _Seen:
    parts: dict[str, list[Tensor]] = {place.name: [] for place in found}
    highest: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def read(name: str, x: Tensor, y: Tensor) -> None:
        x = rows(x)
        seen = x.abs().amax(0)
        highest[name] = torch.maximum(highest.get(name, seen), seen)
        parts[name].append(x[torch.randperm(len(x), generator=generator)[: ROWS // len(images)]])

    with watching({place.name: place.readers[0] for place in found}, read):
        for image in images:
            show(deployed, image)
    return _Seen({name: torch.cat(some) for name, some in parts.items()}, highest)


def _matrix(weight: Tensor) -> Tensor:
    """(out, C), or of a convolution every kernel position's (out, C) one below the other."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])


def _divide(tensor: Tensor, scale: Tensor) -> None:
    tensor /= scale


def _norm(norm: nn.Module) -> Callable[[Tensor], None]:
    assert isinstance(norm, RMSNorm)
    return lambda scale: _divide(norm.weight, scale)


def _value(attention: Attention) -> Callable[[Tensor], None]:
    return lambda scale: scale_rows(attention.v, 1 / scale)


def _downsample(down: Downsample) -> Callable[[Tensor], None]:
    def shrink(scale: Tensor) -> None:
        block = down.conv_block
        for tensor in (down.norm1.weight, down.norm1.bias):
            tensor /= scale
        block.depthwise.weight *= scale[:, None, None, None]
        scale_rows(block.pointwise, 1 / scale)

    return shrink
