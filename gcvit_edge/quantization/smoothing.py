"""Smoothing: channels with large activations are made smaller and the weights that read them larger, exactly, so that one scale a
tensor fits all channels (SmoothQuant, arXiv:2211.10438, equation 4; RepQ-ViT's reparametrization of norms, arXiv:2212.08254, is
its strength of 1; cross-layer equalization, arXiv:1906.04721, is the same between two linears).

GC ViT allows it wherever something linear writes what an integer layer reads, at no cost when it runs:

- a norm before q, k and v, or before fc1, or the last one before the head: its weight;
- the gate of a Fused-MBConv before the pointwise convolution: a factor of each channel's gate;
- a downsampler's feature map before its reduction: the affine of the norm, the depthwise weights, the pointwise outputs;
- v before proj.

The strength is searched at each place, off included, for the least error of what the layers behind it compute in INT8. Three more
need no search, since rows of weights have scales of their own, so that nothing else pays for them:

- the channels of k and v are centred: the softmax does not see what is added to all keys, and what is added to all values
  comes out of attention as it went in, so that proj's bias takes it back;
- the channels of q and k get the same range (local attention, whose products do not change);
- the outputs of proj, fc2 and reductions all get one range, with a factor by channel behind them (`Gain`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.model.deploy import Attention, Block, Downsample, Gain, MBConv, RMSNorm
from gcvit_edge.quantization.integers import Affine, IntegerWeight
from gcvit_edge.quantization.watch import watching

STRENGTHS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
ROWS = 2048  # of activations that a strength is judged by
_IMAGES = 32  # that they are taken from


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


def outputs(deployed: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d, Gain]]:
    """Layers whose outputs have a factor by channel behind them, with their names."""
    for name, module in deployed.named_modules():
        if isinstance(module, Downsample):
            yield f"{name}.reduction", module.reduction, module.gain
        elif isinstance(module, Block):
            yield f"{name}.attention.proj", module.attention.proj, module.residual1.gain
            yield f"{name}.fc2", module.fc2, module.residual2.gain


@torch.no_grad()
def smooth(deployed: nn.Module, images: Iterable[NDArray[np.float32]], strengths: Sequence[float] = STRENGTHS) -> dict[str, float]:
    """Scales the channels of a deploy form in place, as `Form()` writes it; gives the strength that was chosen at each place.

    images: each (B, C, H, W), of the calibration set; the first 32 are used. The logits stay what they are, up to rounding.
    """
    images = [image for _, image in zip(range(_IMAGES), images, strict=False)]
    found = list(places(deployed))
    _centre(deployed, images)
    seen = _observed(deployed, [(place.name, place.readers[0]) for place in found], images)
    chosen = {}
    for place in found:
        weights = [_matrix(reader.weight) for reader in place.readers]
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        rows, highest = seen.rows[place.name], seen.inputs[place.name]
        errors = [_error(rows, weights, _scale(highest, largest, strength)) for strength in strengths]
        best = int(np.argmin(errors))
        chosen[place.name] = strengths[best]
        scale = _scale(highest, largest, strengths[best])
        place.shrink(scale)
        for reader in place.readers:
            reader.weight *= scale if isinstance(reader, nn.Linear) else scale[:, None, None]
    for name, layer, gain in outputs(deployed):
        scale = _scale(seen.outputs[name], torch.ones_like(seen.outputs[name]), 1.0)
        _divide_rows(layer, scale)
        gain.value *= scale
    for name, module in deployed.named_modules():
        if isinstance(module, Attention) and module.q is not None:
            scale = _scale(seen.outputs[f"{name}.q"], seen.outputs[f"{name}.k"], 0.5)
            _divide_rows(module.q, scale)
            _divide_rows(module.k, 1 / scale)
    return chosen


def _centre(deployed: nn.Module, images: Sequence[NDArray[np.float32]]) -> None:
    """Moves the range of every channel of k and v to the middle."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def widen(name: str, x: Tensor, y: Tensor) -> None:
        low, high = y.aminmax(dim=0)
        before = ends.get(name, (low, high))
        ends[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    with watching({name: each for name, each in deployed.named_modules() if name.endswith(("attention.k", "attention.v"))}, widen):
        for image in images:
            deployed(torch.from_numpy(image))
    for name, module in deployed.named_modules():
        if isinstance(module, Attention):
            module.k.bias.sub_(sum(ends[f"{name}.k"]) / 2)
            middle = sum(ends[f"{name}.v"]) / 2
            module.v.bias.sub_(middle)
            module.proj.bias.add_(module.proj.weight @ middle)


def _scale(highest: Tensor, largest: Tensor, strength: float) -> Tensor:
    """(C,): highest ** strength / largest ** (1 - strength), 1 on average in logarithms; 1 for channels that are always 0."""
    logarithm = strength * highest.log() - (1 - strength) * largest.log() if strength else torch.zeros_like(highest)
    live = (highest > 1e-6) & (largest > 1e-12)
    if not live.any():
        return torch.ones_like(highest)
    return torch.where(live, logarithm - logarithm[live].mean(), 0).clamp(-6, 6).exp()


def _error(rows: Tensor, weights: Sequence[Tensor], scale: Tensor) -> float:
    """Squared error of the products of activations (rows, C) with weights (out, C) in INT8, with channels divided by `scale`."""
    shrunk = rows / scale
    rounded = Affine.of_range(float(shrunk.min()), float(shrunk.max()), "int8").round_trip(shrunk)
    return sum(float(F.mse_loss(rounded @ IntegerWeight(w * scale)().T, rows @ w.T, reduction="sum")) for w in weights)


@dataclass(frozen=True)
class _Seen:
    """By name of a layer: rows (rows, C) of its inputs, and the highest magnitude (C,) of every channel of its inputs and outputs."""

    rows: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _observed(deployed: nn.Module, readers: Sequence[tuple[str, nn.Module]], images: Sequence[NDArray[np.float32]]) -> _Seen:
    """Of the inputs of `readers`, by the names given, and of the outputs of all layers, by their own."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in readers}
    inputs: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def widen(maxima: dict[str, Tensor], name: str, x: Tensor) -> None:
        seen = x.abs().amax(0)
        maxima[name] = torch.maximum(maxima.get(name, seen), seen)

    def read(name: str, x: Tensor, y: Tensor) -> None:
        x = _rows(x)
        widen(inputs, name, x)
        rows[name].append(x[torch.randperm(len(x), generator=generator)[: ROWS // _IMAGES]])

    layers = {name: module for name, module in deployed.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    with watching(dict(readers), read), watching(layers, lambda name, x, y: widen(highest, name, _rows(y))):
        for image in images:
            deployed(torch.from_numpy(image))
    return _Seen({name: torch.cat(parts) for name, parts in rows.items()}, inputs, highest)


def _rows(x: Tensor) -> Tensor:
    """(rows, C) of tokens, or of a feature map (B, C, H, W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.ndim == 4 else x


def _matrix(weight: Tensor) -> Tensor:
    """(out, C), or of a convolution every kernel position's (out, C) one below the other."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])


def _divide(tensor: Tensor, scale: Tensor) -> None:
    tensor /= scale


def _divide_rows(layer: nn.Linear | nn.Conv2d, scale: Tensor) -> None:
    """Divides the outputs of a layer by `scale` (out,)."""
    layer.weight /= scale.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias.div_(scale)


def _norm(norm: nn.Module) -> Callable[[Tensor], None]:
    assert isinstance(norm, RMSNorm)
    return lambda scale: _divide(norm.weight, scale)


def _value(attention: Attention) -> Callable[[Tensor], None]:
    return lambda scale: _divide_rows(attention.v, scale)


def _downsample(down: Downsample) -> Callable[[Tensor], None]:
    def shrink(scale: Tensor) -> None:
        block = down.conv_block
        for tensor in (down.norm1.weight, down.norm1.bias):
            tensor /= scale
        block.depthwise.weight *= scale[:, None, None, None]
        _divide_rows(block.pointwise, scale)

    return shrink
