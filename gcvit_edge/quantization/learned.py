"""Fake quantization that learns: the layers of a deploy form rounded as runtimes round them, with weights and ranges to train.

Activations: learned step size quantization (LSQ, arXiv:1902.08153; LSQ+ with an offset, arXiv:2004.09576), as gradients of both ends
of the range (arXiv:2106.08295, section 4.1), which are learned as logarithms, so that one learning rate fits ranges of any size
(TQT, arXiv:1903.08066). Weights: rounded as `IntegerWeight` does, whose scale follows the largest weight, or pair of them, of each
row, with gradients passed straight through; so what is exported are the very integers that were trained.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gcvit_edge.model.deploy import Constant, Point, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.calibrate import Calibrated
from gcvit_edge.quantization.integers import IntegerConstant, IntegerWeight
from gcvit_edge.quantization.layers import Product, RoundedPoint, StaticLayer
from gcvit_edge.quantization.ranges import Ranges
from gcvit_edge.quantization.scheme import Rounding, quantize

_LOWEST, _HIGHEST = -128, 127
_STEPS = _HIGHEST - _LOWEST
_HALF_STEP = 0.5001  # and what float32 rounds the difference of two activations to


class Range(nn.Module):
    """A learned range [low, high], which holds 0; forward() rounds activations to its 256 integers and back.

    logarithms: (2,) of the factors that the ends have changed by since calibration.
    """

    start: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float64))
        self.logarithms = nn.Parameter(torch.zeros(2))

    def ends(self) -> Tensor:
        """(2,) float64: as `Affine.of_range` computes, so that a range gives the same scale and zero point there and here."""
        return self.start * self.logarithms.double().exp()

    def forward(self, x: Tensor) -> Tensor:
        return _Round.apply(x.float(), self.ends())


class _Round(torch.autograd.Function):
    """`Affine.of_range(*ends, "int8").round_trip(x)`. x any shape, float32; ends (2,) float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor) -> Tensor:
        scale = ((ends[1] - ends[0]) / _STEPS).clamp_min(1e-12)
        zero_point = torch.round(_LOWEST - ends[0] / scale).clamp(_LOWEST, _HIGHEST)
        inverse, offset = (1 / scale).float(), zero_point.float()
        y = (x * inverse).round_().add_(offset).clamp_(_LOWEST, _HIGHEST).sub_(offset).mul_(scale.float())
        ctx.save_for_backward(x, y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Within the range dy/dx = 1 and dy/dscale = rounding error (LSQ, equation 3); outside, y is an end of the range
        (but for the rounding of the zero point).

        In few passes, and without waiting for a GPU: on a CPU it is memory that takes the time.
        """
        (gradient,) = gradients
        x, y, inverse = ctx.saved_tensors
        error = (y - x).mul_(inverse)
        passed = torch.ops.aten.hardtanh_backward(gradient, error, -_HALF_STEP, _HALF_STEP)
        by_step = _dot(passed, error) / _STEPS
        low = torch.ops.aten.threshold_backward(gradient, error, _HALF_STEP).sum()
        high = gradient.sum() - passed.sum() - low
        return passed, torch.stack([low - by_step, high + by_step]).double()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


class _RoundWeight(torch.autograd.Function):
    """`IntegerWeight(weight)()`, with the gradient of the identity (straight-through, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return IntegerWeight(weight)()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class LearnedLayer(Product):
    """A linear or convolution that learns its weights in INT8, and the ranges of its input and output where these are rounded.

    Its weight and bias have the names that they have in the layer that it stands for.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, input: Range | None, output: Range | None) -> None:
        super().__init__(layer)
        self.weight = layer.weight
        self.input, self.output = input, output

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x if self.input is None else self.input(x), _RoundWeight.apply(self.weight))
        return y if self.output is None else self.output(y)


class LearnedPoint(Point):
    """A point whose activations are rounded to integers of a learned range."""

    def __init__(self, range: Range) -> None:
        super().__init__()
        self.range = range

    def forward(self, input: Tensor) -> Tensor:
        return self.range(input)


def learnable(calibrated: Calibrated, runtimes: Sequence[Rounding]) -> nn.Module:
    """A copy of the network whose weights and ranges can be trained. What any runtime rounds with a fixed scale is rounded, so that one
    set of weights and ranges serves all; scales that a runtime finds when it runs need no training. Right factors of attention, if that is
    rounded, learn both ends of their ranges, of which ExecuTorch, whose kernels want them symmetric, takes the one farther from 0.

    Places that saw the same extremes hold the same values, such as the inputs of q, k and v: they share a range, or runtimes would
    round what they share more than once.
    """
    student = rewrite(calibrated.network, Form())  # without factors that are 1
    versions = [quantize(rewrite(student, each.form), each.operators, each.arithmetic, calibrated.ranges) for each in runtimes]
    shared: dict[object, Range] = {}

    def of(place: str) -> Range:
        ends = calibrated.ranges[place]
        return shared.setdefault(place if place.endswith("softmax") else ends, Range(*ends))  # of several, the highest value may be 1

    def learns(name: str, module: nn.Module, rounded: Sequence[nn.Module]) -> nn.Module:
        if isinstance(module, nn.Linear | nn.Conv2d) and any(not isinstance(each, nn.Linear | nn.Conv2d) for each in rounded):
            static = [each for each in rounded if isinstance(each, StaticLayer)]
            answers = any(each.output is not None for each in static)
            return LearnedLayer(module, of(f"{name}.input") if static else None, of(f"{name}.output") if answers else None)
        if isinstance(module, Point) and any(isinstance(each, RoundedPoint) for each in rounded):
            return LearnedPoint(of(name))
        return IntegerConstant(module.value) if isinstance(module, Constant) else module

    for name, module in list(student.named_modules()):
        parent, _, child = name.rpartition(".")
        if child and not any(module.children()):
            setattr(student.get_submodule(parent), child, learns(name, module, [version.get_submodule(name) for version in versions]))
    return student


@torch.no_grad()
def learned(calibrated: Calibrated, student: nn.Module) -> Calibrated:
    """What a network that `learnable` made of `calibrated` has learned, for every backend. Neither is changed."""
    network = copy.deepcopy(calibrated.network)
    known = network.state_dict().keys()
    network.load_state_dict({name: value for name, value in student.state_dict().items() if name in known}, strict=False)
    return Calibrated(network, calibrated.ranges | _ranges(student))


def _ranges(student: nn.Module) -> Ranges:
    """The learned ranges by place."""
    ranges: Ranges = {}
    for name, module in student.named_modules():
        places = {}
        if isinstance(module, LearnedLayer):
            places = {f"{name}.input": module.input, f"{name}.output": module.output}
        elif isinstance(module, LearnedPoint):
            places = {name: module.range}
        for place, found in places.items():
            if found is not None:
                low, high = found.ends().tolist()
                ranges[place] = (low, high)
    return ranges
