"""Layers of a quantized deploy form: what integer kernels compute, simulated in PyTorch and exported as it stands."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.integers import Affine, IntegerWeight

_operators = torch.ops.quantized_decomposed


class RoundedPoint(Point):
    """A point whose activations are rounded to integers."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, input: Tensor) -> Tensor:
        return self.affine.round_trip(input)


class StaticLayer(nn.Module):
    """A linear or convolution with an INT8 weight and activations of fixed scales; the bias stays float.

    output: where a kernel answers in integers; None where it answers in float.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: Affine, output: Affine | None) -> None:
        super().__init__()
        self.weight, self.bias = IntegerWeight(layer.weight), layer.bias
        self.input, self.output = input, output
        self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input.round_trip(x), self.weight()
        y = F.linear(x, weight, self.bias) if self.convolution is None else F.conv2d(x, weight, self.bias, *self.convolution)  # type: ignore[arg-type]
        return y if self.output is None else self.output.round_trip(y)


class WeightLinear(nn.Module):
    """A linear with an INT8 weight that computes in float."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = IntegerWeight(layer.weight), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


class DynamicRowLinear(nn.Module):
    """A linear whose input rows are each rounded with a scale found when it runs, as XNNPACK's `qd8` kernels do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = IntegerWeight(layer.weight), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = _operators.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        limits = (scale, zero_point, -128, 127, torch.int8)
        x = _operators.quantize_per_token.default(x, *limits)
        return F.linear(_operators.dequantize_per_token.default(x, *limits, torch.float32), self.weight(), self.bias)


class DynamicImageConv(nn.Module):
    """A convolution whose input is rounded with a scale an image, found when it runs, as XNNPACK's `qd8` kernels do."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = IntegerWeight(conv.weight), conv.bias
        self.convolution = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self._rounded(x) if len(x) == 1 else torch.cat([self._rounded(image) for image in x.split(1)])
        return F.conv2d(x, self.weight(), self.bias, *self.convolution)  # type: ignore[arg-type]

    def _rounded(self, x: Tensor) -> Tensor:
        scale, zero_point = _operators.choose_qparams.tensor(x, -128, 127, 1e-12, torch.int8)
        limits = (scale, zero_point, -128, 127, torch.int8)
        return _operators.dequantize_per_tensor.tensor(_operators.quantize_per_tensor.tensor(x, *limits), *limits)


class DynamicLinear(nn.Module):
    """A linear whose input is rounded with one scale found when it runs, as ONNX's DynamicQuantizeLinear does.

    weight: (in, out) INT8, as MatMulInteger wants it. scale: (out,).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        integers = IntegerWeight(layer.weight)
        self.register_buffer("weight", integers.values.T.contiguous())
        self.register_buffer("scale", integers.scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_linear(x, self.weight, self.scale, self.bias)


class DynamicConv(nn.Module):
    """A convolution without bias whose input is rounded with one scale found when it runs, as ONNX's DynamicQuantizeLinear does.

    weight: (out, in, height, width) INT8. scale: (out,).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        integers = IntegerWeight(conv.weight)
        self.register_buffer("weight", integers.values)
        self.register_buffer("scale", integers.scale)
        self.stride, self.padding = list(conv.stride), list(conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_conv(x, self.weight, self.scale, self.stride, self.padding)


@torch.library.custom_op("gcvit_edge::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """DynamicQuantizeLinear of `x` (rows, in) to UINT8, MatMulInteger with `weight` (in, out) INT8, and back to float.

    Source: ONNX operator DynamicQuantizeLinear-11. One operator, because no exporter knows the parts of it.
    """
    integers, step = _rounded(x)
    y = (integers @ weight.to(x.dtype)) * (step * scale)
    return y if bias is None else y + bias


@dynamic_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("gcvit_edge::dynamic_conv", mutates_args=())
def dynamic_conv(x: Tensor, weight: Tensor, scale: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """DynamicQuantizeLinear of `x` (B, in, H, W) to UINT8, ConvInteger with `weight` (out, in, height, width) INT8, back to float.

    Source: ONNX operators DynamicQuantizeLinear-11, ConvInteger-10.
    """
    integers, step = _rounded(x)
    return F.conv2d(integers, weight.to(x.dtype), None, stride, padding) * (step * scale)[:, None, None]


@dynamic_conv.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of x about their zero point, and their scale, as DynamicQuantizeLinear finds them."""
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    step = (high - low).clamp_min(1e-12) / 255
    zero_point = torch.round(-low / step).clamp(0, 255)
    return torch.clamp(torch.round(x / step) + zero_point, 0, 255) - zero_point, step
