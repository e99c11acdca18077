"""What a recipe's operators mean for each layer, in the arithmetic of a runtime."""

import copy
from collections.abc import Collection

import torch
from torch import nn

from gcvit_edge.model.deploy import Constant, Point, Residual
from gcvit_edge.quantization.arithmetic import Arithmetic, Scales
from gcvit_edge.quantization.integers import Affine, IntegerConstant
from gcvit_edge.quantization.layers import (
    DynamicConv,
    DynamicImageConv,
    DynamicLinear,
    DynamicRowLinear,
    RoundedPoint,
    StaticLayer,
    WeightLinear,
)
from gcvit_edge.quantization.ranges import Ranges
from gcvit_edge.recipe import Operator

# one row an image, or the logits themselves: half of an XXT's noise if they were static, at 0.1 % of its work
_DELICATE = ("head", "squeeze", "excite")
_FLOAT_INPUT: dict[Scales, type[nn.Module]] = {"dynamic": DynamicLinear, "dynamic_row": DynamicRowLinear, "weights": WeightLinear}


@torch.no_grad()
def quantize(
    deployed: nn.Module, operators: frozenset[Operator], arithmetic: Arithmetic, ranges: Ranges, keep: Collection[str] = ()
) -> nn.Module:
    """A copy of a deploy form with the layers of `operators` in integers, but for those named in `keep`. Constants are always stored as
    INT8: the position biases are 14 % of the float file of XXT, and their rounding leaves 84 dB."""
    quantized = copy.deepcopy(deployed)

    def affine(place: str) -> Affine:
        return Affine.of_range(*ranges[place], arithmetic.activations)

    def integer(name: str, module: nn.Module, parent: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear) and "linear" in operators:
            scales = arithmetic.delicate if name.endswith(_DELICATE) else arithmetic.linear
            if scales != "static":
                return _FLOAT_INPUT[scales](module)
            return StaticLayer(module, affine(f"{name}.input"), affine(f"{name}.output") if arithmetic.linear_output else None)
        if isinstance(module, nn.Conv2d) and "conv" in operators and _is_worth_it(module):
            if arithmetic.conv != "static":
                return DynamicImageConv(module) if arithmetic.conv == "dynamic_image" else DynamicConv(module)
            return StaticLayer(module, affine(f"{name}.input"), affine(f"{name}.output") if arithmetic.conv_output else None)
        if isinstance(module, Point) and ("residual" if isinstance(parent, Residual) else "attention") in operators:
            return RoundedPoint(affine(name))
        return IntegerConstant(module.value) if isinstance(module, Constant) else module

    for name, module in list(quantized.named_modules()):
        parent_name, _, child = name.rpartition(".")
        if child and name not in keep:
            parent = quantized.get_submodule(parent_name)
            setattr(parent, child, integer(name, module, parent))
    return quantized


def _is_worth_it(conv: nn.Conv2d) -> bool:
    """Not the convolution of the image: 1 % of the work, it would alone be half of the noise. Nor depthwise ones, for which rounding
    costs what integers gain, in every runtime (benchmarks/NOTES.md)."""
    reads_image = conv.in_channels <= 4
    return not reads_image and conv.groups == 1
