"""Affine quantization: real = (integer - zero_point) * scale, in the operators that all exporters know.

`torch.ops.quantized_decomposed` is the vocabulary of PyTorch 2 export quantization: ExecuTorch lowers it, PyTorch's ONNX
exporter turns it into QuantizeLinear and DequantizeLinear, and the OpenVINO backend into FakeQuantize.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchao.quantization.pt2e  # noqa: F401  # defines the operators
from torch import Tensor, nn

from gcvit_edge.quantization.arithmetic import Signedness

_operators = torch.ops.quantized_decomposed

_LIMITS: dict[str, tuple[int, int, torch.dtype]] = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of one tensor of activations, 8 bits."""

    scale: float
    zero_point: int
    dtype: Signedness

    @staticmethod
    def of_range(low: float, high: float, dtype: Signedness) -> "Affine":
        """The finest scale that covers [low, high] and has an exact zero, as padding and ReLU-like outputs want it."""
        low, high = min(low, 0.0), max(high, 0.0)
        smallest, largest, _ = _LIMITS[dtype]
        scale = max((high - low) / (largest - smallest), 1e-12)
        return Affine(scale, min(max(round(smallest - low / scale), smallest), largest), dtype)

    @staticmethod
    def symmetric(low: float, high: float, dtype: Signedness) -> "Affine":
        """The finest scale that covers [low, high] with a zero point in the middle of the integers."""
        scale = max(-low, high, 1e-12) / 127
        return Affine(scale, 0 if dtype == "int8" else 128, dtype)

    def round_trip(self, x: Tensor) -> Tensor:
        """x rounded to the integers and back: what an integer kernel sees of it."""
        arguments = (self.scale, self.zero_point, *_LIMITS[self.dtype])
        return _operators.dequantize_per_tensor.default(_operators.quantize_per_tensor.default(x, *arguments), *arguments)


class IntegerWeight(nn.Module):
    """A weight (out, in, ...) as INT8 with one scale an output channel, symmetric; forward() is the weight in float.

    The values of two neighbouring input channels (the first and the second, the third and the fourth, ...) add up to at most 128, so
    that the sum of their products with UINT8 activations fits 16 bits. x86 CPUs without VNNI add these two in 16 bits, where too large
    a sum becomes the largest integer there is, without a word (VPMADDUBSW; oneDNN, "Nuances of int8 computations"; ONNX Runtime,
    "Quantize ONNX models", U8S8). Weights of 7 bits, which both advise, cost more accuracy (benchmarks/NOTES.md).
    """

    LIMITS = (-127, 127)
    PAIR = 128

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, least: Tensor | None = None) -> None:
        """least: (out,), what scales are at least."""
        super().__init__()
        pairs = _pairs(weight.detach().double())  # exact: in float32 the largest pair might be rounded to 127 or 129
        sums = pairs[:, :, 0] + pairs[:, :, 1]  # sum() over so short an axis takes half of all time here
        largest, largest_sum = (each.abs().flatten(1).amax(1) for each in (pairs, sums))
        scale = torch.maximum(largest / self.LIMITS[1], largest_sum / self.PAIR).clamp_min(1e-12)
        if least is not None:
            scale = torch.maximum(scale, least)
        values = (pairs / scale.view(-1, 1, 1, 1)).round_()
        values[:, :, 1] = self._beside(values[:, :, 1], values[:, :, 0])
        self.register_buffer("values", _channels(values, weight.shape).to(torch.int8).contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int64))

    def forward(self) -> Tensor:
        return _operators.dequantize_per_channel.default(self.values, self.scale, self.zero_point, 0, *self.LIMITS, torch.int8)

    def nearest(self, weights: Tensor, channel: int, chosen: Tensor) -> Tensor:
        """Other weights (out,) of an input channel, those of a kernel counted one after the other, on the grid of this one, beside
        the weights (out, in) that are chosen so far, which are on it."""
        pixels = self.values[0, 0].numel()
        neighbour = channel - pixels if channel // pixels % 2 else channel + pixels
        integers = torch.clamp(torch.round(weights / self.scale), *self.LIMITS)
        if neighbour < chosen.shape[1]:
            integers = self._beside(integers, torch.round(chosen[:, neighbour] / self.scale))
        return integers * self.scale

    def _beside(self, values: Tensor, neighbours: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(values, -self.PAIR - neighbours), self.PAIR - neighbours)

    def fixed(self) -> Tensor:
        """The weights that scales follow from, (out, in) bool: with them as they are, other values have the same scales."""
        pairs = _pairs(self.values.int())
        together = (pairs.sum(2, keepdim=True).abs() == self.PAIR).expand_as(pairs)
        return _channels((pairs.abs() == self.LIMITS[1]) | together, self.values.shape).flatten(1)


def _pairs(weight: Tensor) -> Tensor:
    """(out, in, ...) as (out, in / 2, 2, pixels of the kernel), with zeros beside an odd last channel."""
    channels = weight.reshape(*weight.shape[:2], -1)
    return F.pad(channels, (0, 0, 0, channels.shape[1] % 2)).unflatten(1, (-1, 2))


def _channels(pairs: Tensor, shape: Sequence[int]) -> Tensor:
    """The way back."""
    return pairs.flatten(1, 2)[:, : shape[1]].reshape(shape)


class GroupedWeight(nn.Module):
    """A weight (out, in) of a linear as INT4 with one scale for 32 input channels, symmetric; forward() is the weight in float.

    values: (out, in) int8 within -8..7. scale: (out, in / 32), bfloat16 values, as XNNPACK's `qb4w` kernels want them. The scale of a
    group is the one of least squared error among those that make its largest magnitude 4 to 8; so a weight that lies on such a grid
    already stays as it is.

    Raises:
        ValueError: the number of input channels is no multiple of 32.
    """

    GROUP = 32
    LIMITS = (-8, 7)

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.shape[1] % self.GROUP:
            raise ValueError(f"INT4 weights need a multiple of {self.GROUP} input channels, got {weight.shape[1]}")
        groups = weight.reshape(-1, self.GROUP)
        highest = groups.abs().amax(1, keepdim=True).clamp_min(1e-8)
        scales = torch.stack([(highest / level).bfloat16().float() for level in (8, 7.5, 7, 6.5, 6, 5.5, 5, 4)])
        errors = (torch.clamp(torch.round(groups / scales), *self.LIMITS) * scales - groups).square().sum(-1, keepdim=True)
        scale = scales.gather(0, errors.argmin(0, keepdim=True))[0]
        values = torch.clamp(torch.round(groups / scale), *self.LIMITS)
        self.register_buffer("values", values.to(torch.int8).reshape(weight.shape))
        self.register_buffer("scale", scale.reshape(len(weight), -1))
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int32))

    def forward(self) -> Tensor:
        kind = (*self.LIMITS, torch.int8, self.GROUP, torch.float32)
        return _operators.dequantize_per_channel_group.default(self.values, self.scale, self.zero_point, *kind)

    def nearest(self, weights: Tensor, channel: int, chosen: Tensor) -> Tensor:
        """Other weights (out,) of an input channel on the grid of this one. chosen: as for `IntegerWeight`, not looked at."""
        scale = self.scale[:, channel // self.GROUP]
        return torch.clamp(torch.round(weights / scale), *self.LIMITS) * scale

    def fixed(self) -> Tensor:
        """The weights that must stay for the same scales, (out, in) bool: none, since scales are found by the error that they leave."""
        return torch.zeros_like(self.values, dtype=torch.bool)


class HalfWeight(nn.Module):
    """A weight or constant in float16 or bfloat16; forward() is it in float32."""

    values: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("values", weight.detach().to(dtype))

    def forward(self) -> Tensor:
        return self.values.float()

    def nearest(self, weights: Tensor, channel: int, chosen: Tensor) -> Tensor:
        """Other weights (out,) of an input channel in this one's type. chosen: as for `IntegerWeight`, not looked at."""
        return weights.to(self.values.dtype).float()

    def fixed(self) -> Tensor:
        """The weights that must stay, (out, in) bool: none, since every one has its own exponent."""
        return torch.zeros_like(self.values.flatten(1), dtype=torch.bool)


class IntegerConstant(nn.Module):
    """A constant as INT8 with one scale, symmetric; forward() is the constant in float."""

    values: Tensor

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.scale = max(float(constant.abs().max()) / 127, 1e-12)
        self.register_buffer("values", torch.round(constant / self.scale).to(torch.int8).contiguous())

    def forward(self) -> Tensor:
        return _operators.dequantize_per_tensor.default(self.values, self.scale, 0, -127, 127, torch.int8)
