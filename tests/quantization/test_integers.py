import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcvit_edge.quantization.integers import Affine, IntegerConstant, IntegerWeight

finite = st.floats(-1e4, 1e4, allow_nan=False)


@given(low=finite, high=finite, dtype=st.sampled_from(["int8", "uint8"]))
def test_a_range_is_covered_to_half_a_step_and_zero_is_exact(low: float, high: float, dtype: str) -> None:
    low, high = min(low, high), max(low, high)
    affine = Affine.of_range(low, high, dtype)
    assert (0 if dtype == "uint8" else -128) <= affine.zero_point <= (255 if dtype == "uint8" else 127)
    x = torch.linspace(low, high, 101, dtype=torch.float64).float()
    assert (affine.round_trip(x) - x).abs().max() <= affine.scale * 0.51 + 1e-6 * max(abs(low), abs(high))
    assert affine.round_trip(torch.zeros(1)).item() == 0


def test_values_outside_the_range_are_clipped() -> None:
    affine = Affine.of_range(-1, 1, "uint8")
    np.testing.assert_allclose(affine.round_trip(torch.tensor([-9.0, 9.0])), [-1, 1], atol=affine.scale)


@pytest.mark.parametrize("shape", [(8, 5), (6, 4, 3, 3)])
def test_weights_have_a_scale_an_output_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    integers = IntegerWeight(weight)
    assert integers.values.dtype == torch.int8
    assert integers.values.abs().flatten(1).amax(1).tolist() == [127] * shape[0]
    step = integers.scale.view(-1, *[1] * (len(shape) - 1))
    assert ((integers() - weight).abs() <= step * 0.5001).all()


def test_a_weight_of_zeros_stays_zero() -> None:
    assert not IntegerWeight(torch.zeros(3, 4))().any()
    assert not IntegerConstant(torch.zeros(2, 2))().any()
