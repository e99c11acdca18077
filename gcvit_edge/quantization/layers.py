"""Layers of a quantized deploy form: what integer kernels compute, simulated in PyTorch and exported as it stands."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.integers import Affine, GroupedWeight, IntegerWeight

_operators = torch.ops.quantized_decomposed


class RoundedPoint(Point):
    """A point whose activations are rounded to integers."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, input: Tensor) -> Tensor:
        return self.affine.round_trip(input)


class Product(nn.Module):
    """What a linear or convolution computes, of an input and a weight that were treated before; the bias stays float."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.bias = layer.bias
        self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias) if self.convolution is None else F.conv2d(x, weight, self.bias, *self.convolution)  # type: ignore[arg-type]


class StaticLayer(Product):
    """A linear or convolution with an INT8 weight and activations of fixed scales.

    output: where a kernel answers in integers; None where it answers in float.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: Affine, output: Affine | None) -> None:
        super().__init__(layer)
        # XNNPACK has the bias in 32 bits, in steps of both scales: of a row of next to no weights it would not fit. Weights that vanish in
        # larger steps are nothing beside such a bias
        least = None if layer.bias is None else layer.bias.detach().abs().double() / (input.scale * 2**30)
        self.weight = IntegerWeight(layer.weight, least)
        self.input, self.output = input, output

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.input.round_trip(x), self.weight())
        return y if self.output is None else self.output.round_trip(y)


class StaticConvLinear(StaticLayer):
    """A linear written as the 1x1 convolution that it is too: tokens (N, C) are a feature map of one column, channels last."""

    def __init__(self, layer: nn.Linear, input: Affine, output: Affine | None) -> None:
        convolution = nn.Conv2d(layer.in_features, layer.out_features, 1, device="meta")
        convolution.weight, convolution.bias = nn.Parameter(layer.weight[:, :, None, None]), layer.bias
        super().__init__(convolution, input, output)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        return super().product(column, weight).permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class WeightLayer(Product):
    """A linear or convolution that computes in float, with a weight that is stored in another way; `weight()` is it in float."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: nn.Module) -> None:
        super().__init__(layer)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight())


class DynamicRowLinear(Product):
    """A linear whose input rows are each rounded with a scale found when it runs, as XNNPACK's `qd8` kernels do."""

    def __init__(self, layer: nn.Linear, weight: nn.Module) -> None:
        super().__init__(layer)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.product(_rounded_rows(x), self.weight())


class DynamicConv2d(Product):
    """A convolution whose input is rounded with scales found when it runs, as XNNPACK's `qd8` kernels do: one an image, or, of a 1x1
    convolution, one a pixel.

    Exported it has one an image in either case, since ExecuTorch's partitioner knows no other; XNNPACK runs a 1x1 convolution as
    `Fully Connected (NC, QDU8, F32, QC8W)`, which rounds row by row.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.weight = IntegerWeight(conv.weight)
        self._is_pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_pointwise and not torch.compiler.is_exporting():
            return self.product(_rounded_rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), self.weight())
        x = _rounded_image(x) if len(x) == 1 else torch.cat([_rounded_image(image) for image in x.split(1)])
        return self.product(x, self.weight())


def _rounded_rows(x: Tensor) -> Tensor:
    """`x` (..., C) as INT8 gives it back, with a scale and a zero point for each row."""
    scale, zero_point = _operators.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    limits = (scale, zero_point, -128, 127, torch.int8)
    return _operators.dequantize_per_token.default(_operators.quantize_per_token.default(x, *limits), *limits, torch.float32)


def _rounded_image(x: Tensor) -> Tensor:
    """`x` as INT8 gives it back, with one scale and zero point."""
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
    """A convolution whose input is rounded as that of `DynamicLinear`: the same product, of the pixels that each output reads.

    weight: (kernel height * kernel width * in, out) INT8; where `in` is odd, a channel of zeros more, so that neighbours in a product
    are neighbours of a pixel (`IntegerWeight`). scale: (out,).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        integers = IntegerWeight(conv.weight)
        values = F.pad(integers.values, (0, 0, 0, 0, 0, conv.in_channels % 2))
        self.register_buffer("weight", values.permute(2, 3, 1, 0).flatten(0, 2).contiguous())
        self.register_buffer("scale", integers.scale)
        self.bias = conv.bias
        self.kernel, self.stride, self.padding = (list(each) for each in (conv.kernel_size, conv.stride, conv.padding))

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_conv(x, self.weight, self.scale, self.bias, self.kernel, self.stride, self.padding)


class GroupedLinear(nn.Module):
    """A linear with INT4 weights in groups, as ONNX Runtime's MatMulNBits has it.

    rounded: whether activations are rounded to INT8 with a scale for each 32 channels of a row, found when it runs.
    """

    def __init__(self, layer: nn.Linear, rounded: bool) -> None:
        super().__init__()
        weight = GroupedWeight(layer.weight)
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias, self.rounded = layer.bias, rounded

    def forward(self, x: Tensor) -> Tensor:
        y = grouped_linear(x, self.values, self.scale, self.rounded)
        return y if self.bias is None else y + self.bias


@torch.library.custom_op("gcvit_edge::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, values: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    """x (rows, in) times the INT4 weight (out, in) with `scale` (out, in / 32).

    Source: ONNX Runtime's contributed operator MatMulNBits; its accuracy_level 4 rounds activations.
    """
    if rounded:
        groups = x.reshape(len(x), -1, GroupedWeight.GROUP)
        step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        x = (torch.round(groups / step) * step).reshape(x.shape)
    weight = values.to(x.dtype).reshape(*scale.shape, -1) * scale[..., None]
    return x @ weight.reshape(values.shape).T


@grouped_linear.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op("gcvit_edge::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """DynamicQuantizeLinear of `x` (rows, in) to UINT8, MatMulInteger with `weight` (in, out) INT8, and back to float.

    Source: ONNX operator DynamicQuantizeLinear-11. One operator, because no exporter knows the parts of it.
    """
    integers, step = _dynamic_integers(x)
    y = (integers @ weight.to(x.dtype)) * (step * scale)
    return y if bias is None else y + bias


@dynamic_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("gcvit_edge::dynamic_conv", mutates_args=())
def dynamic_conv(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Convolution of `x` (B, in, H, W), rounded as `dynamic_linear` rounds, with `weight` (kernel height * kernel width * in, out) INT8,
    which may have channels more than `x`."""
    integers, step = _dynamic_integers(x)
    maps = weight.to(x.dtype).reshape(*kernel, -1, weight.shape[1]).permute(3, 2, 0, 1)[:, : x.shape[1]]
    y = F.conv2d(integers, maps, None, stride, padding) * (step * scale)[:, None, None]  # type: ignore[arg-type]
    return y if bias is None else y + bias[:, None, None]


@dynamic_conv.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    return x.new_empty(x.shape[0], weight.shape[1], height, width)


def _dynamic_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of `x` without their zero point, as floats, and the step between them."""
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    step = (high - low).clamp_min(1e-12) / 255
    zero_point = torch.round(-low / step).clamp(0, 255)
    return torch.clamp(torch.round(x / step) + zero_point, 0, 255) - zero_point, step
