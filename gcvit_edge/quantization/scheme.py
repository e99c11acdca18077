"""What a recipe's precision and operators mean for each layer, in the arithmetic of a runtime."""

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from gcvit_edge.artifact import Precision
from gcvit_edge.model.deploy import Constant, Point, Residual, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic, Scales
from gcvit_edge.quantization.integers import Affine, GroupedWeight, HalfWeight, IntegerConstant, IntegerWeight
from gcvit_edge.quantization.keep import layer_names
from gcvit_edge.quantization.layers import (
    DynamicConv,
    DynamicConv2d,
    DynamicLinear,
    DynamicRowLinear,
    GroupedLinear,
    RoundedPoint,
    StaticConvLinear,
    StaticLayer,
    WeightLayer,
)
from gcvit_edge.quantization.ranges import Ranges
from gcvit_edge.quantization.rounding import Grid, Grids
from gcvit_edge.recipe import Operator


@dataclass(frozen=True)
class Rounding:
    """What a runtime rounds, and how, of a network that is written as it wants it."""

    operators: frozenset[Operator]
    arithmetic: Arithmetic
    form: Form = field(default_factory=Form)


# one row an image, or the logits themselves: half of an XXT's noise if they were static, at 0.1 % of its work
_DELICATE = ("head", "squeeze", "excite")
_LATE_POINTWISE = re.compile(r"stages\.[23]\..*\.pointwise")
_LAST_MLP = re.compile(r"stages\.3\..*\.fc[12]")
_HALVES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MLP = ("fc1", "fc2")
_RIGHT = ("attention.k.output", "attention.key", "attention.v.output", "attention.value")  # right factors of products
_ANSWERS = ("scores", "attended")  # of products of attention: float where kernels answer in float


def _in_four_bits(name: str, channels: int, precision: Precision) -> bool:
    """Whether a linear of this name with so many input channels has INT4 weights. Not 1x1 convolutions, which are linears in some
    forms only: convolutions are INT8 in every runtime."""
    return precision in ("w4a8", "int4") and not name.endswith((*_DELICATE, "pointwise")) and channels % GroupedWeight.GROUP == 0


def _operator(name: str, module: nn.Module) -> Operator | None:
    """What a recipe calls a layer. 1x1 convolutions are linears in some forms, and are convolutions in every recipe."""
    if isinstance(module, nn.Linear):
        return "conv" if name.endswith("pointwise") else "linear"
    return "conv" if isinstance(module, nn.Conv2d) else None


def weight_grids(deployed: nn.Module, operators: Collection[Operator], precision: Precision) -> Grids:
    """How the weights of layers that `operators` rounds are rounded, the same in every runtime."""
    half = _HALVES.get(precision)

    def grid(name: str, module: nn.Module) -> Grid | None:
        if _operator(name, module) not in operators:
            return None
        if half is not None:
            return partial(HalfWeight, dtype=half)
        if isinstance(module, nn.Linear):
            return GroupedWeight if _in_four_bits(name, module.in_features, precision) else IntegerWeight
        return IntegerWeight if isinstance(module, nn.Conv2d) and _is_worth_it(name, module) else None

    grids = ((name, grid(name, module)) for name, module in deployed.named_modules())
    return {name: kind for name, kind in grids if kind is not None}


@torch.no_grad()
def quantize(
    deployed: nn.Module,
    operators: frozenset[Operator],
    arithmetic: Arithmetic,
    ranges: Ranges,
    precision: Precision = "int8",
    keep: Collection[str] = (),
) -> nn.Module:
    """A copy of a deploy form with the layers of `operators` in `precision`, but for those named in `keep`. Constants are stored like
    weights, in 8 bits at least: the position biases are 14 % of the float file of XXT, and their rounding leaves 84 dB."""
    quantized, grids = copy.deepcopy(deployed), weight_grids(deployed, operators, precision)

    def affine(place: str) -> Affine:
        symmetric = arithmetic.symmetric_right and "attention" in operators and place.endswith(_RIGHT)
        return (Affine.symmetric if symmetric else Affine.of_range)(*ranges[place], arithmetic.activations)

    def scales_of(name: str) -> Scales:
        if name.endswith(_DELICATE):
            return arithmetic.delicate
        if arithmetic.late_pointwise and _LATE_POINTWISE.fullmatch(name):
            return arithmetic.late_pointwise
        if arithmetic.last_mlp and _LAST_MLP.fullmatch(name):
            return arithmetic.last_mlp
        return arithmetic.mlp if name.endswith(_MLP) else arithmetic.linear

    def linear(name: str, layer: nn.Linear) -> nn.Module:
        if grids[name] is GroupedWeight:
            if arithmetic.grouped == "dynamic_block":
                return GroupedLinear(layer, rounded=precision == "w4a8")
            weight = GroupedWeight(layer.weight)
            return DynamicRowLinear(layer, weight) if arithmetic.grouped == "dynamic_row" else WeightLayer(layer, weight)
        scales = scales_of(name)
        if precision == "int4" or scales == "weights":
            return WeightLayer(layer, IntegerWeight(layer.weight))
        if scales == "dynamic":
            return DynamicLinear(layer)
        if scales == "dynamic_row":
            return DynamicRowLinear(layer, IntegerWeight(layer.weight))
        static = StaticConvLinear if arithmetic.static_linear == "conv" else StaticLayer
        return static(layer, affine(f"{name}.input"), affine(f"{name}.output") if arithmetic.linear_output else None)

    def conv(name: str, layer: nn.Conv2d) -> nn.Module:
        if precision == "int4":
            return WeightLayer(layer, IntegerWeight(layer.weight))
        if arithmetic.conv == "dynamic":
            return DynamicConv(layer)
        if arithmetic.conv == "dynamic_image":
            return DynamicConv2d(layer)
        return StaticLayer(layer, affine(f"{name}.input"), None)

    def treated(name: str, module: nn.Module, parent: nn.Module) -> nn.Module:
        half = _HALVES.get(precision)
        if half is not None and isinstance(module, nn.Linear | nn.Conv2d) and name in grids:
            return WeightLayer(module, grids[name](module.weight))
        if isinstance(module, Constant):
            return IntegerConstant(module.value) if half is None else HalfWeight(module.value, half)
        if isinstance(module, nn.Linear) and name in grids:
            return linear(name, module)
        if isinstance(module, nn.Conv2d) and name in grids:
            return conv(name, module)
        if isinstance(module, Point) and ("residual" if isinstance(parent, Residual) else "attention") in operators:
            answered = name.endswith(_ANSWERS) and not arithmetic.linear_output
            return module if answered else RoundedPoint(affine(name))
        return module

    for name, module in list(quantized.named_modules()):
        parent_name, _, child = name.rpartition(".")
        if child and name not in keep and parent_name not in keep:
            parent = quantized.get_submodule(parent_name)
            setattr(parent, child, treated(name, module, parent))
    return quantized


def places_with_ranges(deployed: nn.Module, runtimes: Sequence[Rounding], precision: Precision = "int8") -> frozenset[str]:
    """The places that any of these runtimes rounds with a scale of calibration."""
    asked: Ranges = defaultdict(lambda: (-1.0, 1.0))  # which keeps what it was asked for
    for runtime in runtimes:
        quantize(rewrite(deployed, runtime.form), runtime.operators, runtime.arithmetic, asked, precision)
    return frozenset(asked)


def roundable_layers(deployed: nn.Module, operators: Collection[Operator], precision: Precision) -> frozenset[str]:
    """Those of `layer_names` that `quantize` may round: some runtimes round less."""
    found = set(weight_grids(deployed, operators, precision))
    for name in layer_names(deployed):
        module = deployed.get_submodule(name)
        if isinstance(module, Point | Residual) and ("residual" if isinstance(module, Residual) else "attention") in operators:
            found.add(name)
    return frozenset(found)


def _is_worth_it(name: str, conv: nn.Conv2d) -> bool:
    """Not the convolution of the image: 1 % of the work, it would alone be half of the noise. Nor depthwise ones, for which rounding
    costs what integers gain, in every runtime (benchmarks/NOTES.md)."""
    return name != "conv1" and conv.groups == 1
