import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gcvit_edge.quantization.integers import Affine, GroupedWeight, IntegerConstant, IntegerWeight
from gcvit_edge.quantization.layers import StaticLayer

finite = st.floats(-1e4, 1e4, allow_nan=False)


@given(low=finite, high=finite, dtype=st.sampled_from(["int8", "uint8"]))
def test_a_range_is_covered_to_half_a_step_and_zero_is_exact(low: float, high: float, dtype: str) -> None:
    low, high = min(low, high), max(low, high)
    affine = Affine.of_range(low, high, dtype)
    assert affine.scale == pytest.approx(max((max(high, 0) - min(low, 0)) / 255, 1e-12))
    assert (0 if dtype == "uint8" else -128) <= affine.zero_point <= (255 if dtype == "uint8" else 127)
    x = torch.linspace(low, high, 101, dtype=torch.float64).float()
    assert (affine.round_trip(x) - x).abs().max() <= affine.scale * 0.51 + 1e-6 * max(abs(low), abs(high))
    assert affine.round_trip(torch.zeros(1)).item() == 0


def test_values_outside_the_range_are_clipped() -> None:
    affine = Affine.of_range(-1, 1, "uint8")
    np.testing.assert_allclose(affine.round_trip(torch.tensor([-9.0, 9.0])), [-1, 1], atol=affine.scale)


@pytest.mark.parametrize("shape", [(8, 5), (8, 6), (6, 1), (6, 4, 3, 3), (6, 3, 2, 2)])
def test_weights_have_a_scale_an_output_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    integers = IntegerWeight(weight)
    assert integers.values.dtype == torch.int8
    assert (largest_of(integers.values) == 1).all()  # no finer scale would do
    step = integers.scale.view(-1, *[1] * (len(shape) - 1))
    assert ((integers() - weight).abs() <= step * 0.5001).all()


def largest_of(values: torch.Tensor) -> torch.Tensor:
    """How near a row (out,) comes to the bounds of IntegerWeight, 1 being at one of them. values: (out, in, ...)."""
    first, second = (values.flatten(2)[:, i::2] if values.ndim > 2 else values[:, i::2, None] for i in (0, 1))
    both = first[:, : second.shape[1]].int() + second.int()
    pairs = [both.abs().flatten(1).amax(1) / 128] if both.numel() else []
    return torch.stack([values.int().abs().flatten(1).amax(1) / 127, *pairs]).amax(0)


@given(
    weight=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    kernel=st.sampled_from([(6,), (3, 2), (2, 3)]),
)
def test_two_products_with_uint8_fit_16_bits(weight: list[list[float]], kernel: tuple[int, ...]) -> None:
    """As VPMADDUBSW adds them up: neighbouring input channels, activations of 0 to 255."""
    values = IntegerWeight(torch.tensor(weight).reshape(-1, *kernel)).values.int()
    first, second = values[:, : kernel[0] // 2 * 2 : 2], values[:, 1::2]
    for a, b in ((255, 255), (255, 0), (0, 255)):
        sums = a * first + b * second
        assert (sums >= -(2**15)).all()
        assert (sums < 2**15).all()


def test_the_same_integers_are_found_again() -> None:
    torch.manual_seed(0)
    first = IntegerWeight(torch.randn(256, 64) ** 3)
    again = IntegerWeight(first())
    assert torch.equal(again.values, first.values)
    torch.testing.assert_close(again.scale, first.scale, rtol=3e-7, atol=0)


def test_a_weight_of_zeros_stays_zero() -> None:
    assert not IntegerWeight(torch.zeros(3, 4))().any()
    assert not IntegerConstant(torch.zeros(2, 2))().any()


@pytest.mark.parametrize(("dtype", "middle"), [("int8", 0), ("uint8", 128)])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, 1.0)])
def test_a_symmetric_range_has_its_zero_in_the_middle(low: float, high: float, dtype: str, middle: int) -> None:
    affine = Affine.symmetric(low, high, dtype)
    assert (affine.scale, affine.zero_point) == (3 / 127, middle)
    np.testing.assert_allclose(affine.round_trip(torch.tensor([-3.0, 0.0, 3.0])), [-3, 0, 3], rtol=1e-6)


def test_a_constant_is_within_half_a_step_of_127() -> None:
    torch.manual_seed(0)
    constant = torch.randn(40, 50)
    constant[0, 0] = -5.08
    integers = IntegerConstant(constant)
    assert integers.scale == pytest.approx(5.08 / 127)
    assert integers.values.min() == -127
    assert (integers() - constant).abs().max() <= 0.02 * 1.0001


def test_int4_has_the_best_scale_of_a_group() -> None:
    """Of those that make its largest magnitude 4 to 8, by the squared error that they leave."""
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    integers = GroupedWeight(weight)
    assert integers.values.min() >= -8
    assert integers.values.max() <= 7
    assert integers.scale.shape == (40, 2)
    groups, largest = weight.view(-1, 32), weight.view(-1, 32).abs().amax(1, keepdim=True)
    errors = []
    for level in (8, 7.5, 7, 6.5, 6, 5.5, 5, 4):
        scale = (largest / level).bfloat16().float()
        errors.append(((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1))
    torch.testing.assert_close((integers() - weight).view(-1, 32).square().sum(1), torch.stack(errors).amin(0))
    assert torch.stack(errors).argmin(0).unique().numel() > 3  # no level is best for all


@torch.no_grad()
def test_a_bias_fits_32_bits_in_steps_of_both_scales() -> None:
    """As XNNPACK has it; for a row of next to no weights these steps would be too small."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.rand(20, 6)
    layer.weight[1] *= 1e-12
    layer.weight[2] = 0
    layer.bias[:] = torch.tensor([0.5, -2, 3])
    static = StaticLayer(layer, Affine.of_range(0, 1, "int8"), None)
    steps = layer.bias.abs().double() / (static.weight.scale.double() * static.input.scale)
    assert (steps <= 1.0001 * 2**30).all()
    assert static.weight.scale[0] == IntegerWeight(layer.weight).scale[0]  # which needs no larger one
    torch.testing.assert_close(static(x), layer(x), rtol=0, atol=0.01)
