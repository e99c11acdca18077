"""What activations look like, against NumPy's word on the same numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.activations import Activations, activations


class Layers(nn.Module):
    """A convolution, a point of its tokens by window, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point, self.linear = nn.Conv2d(5, 7, 3, padding=1), Point(), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.point(self.conv(x).permute(0, 2, 3, 1).reshape(2, 2, -1, 7)).reshape(-1, 7))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Three, the first with an outlier, the last with a channel that is large there alone; all values have a mean far from 0."""
    found = [np.random.default_rng(seed).normal(3, 1, (1, 5, 8, 6)).astype(np.float32) for seed in range(3)]
    found[0][0, 1, 2, 3] = -14
    found[1][0, 4] *= 6
    return found


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


@pytest.fixture(scope="module")
def described(network: nn.Module, images: list[np.ndarray]) -> dict[str, Activations]:
    return {each.place: each for each in activations(network, images)}


def test_places_are_in_the_order_in_which_they_are_computed(described: dict[str, Activations]) -> None:
    assert list(described) == ["conv.input", "conv.output", "point", "linear.input", "linear.output"]


def test_numbers_are_those_of_all_values_of_all_images(described: dict[str, Activations], images: list[np.ndarray]) -> None:
    values, found = np.concatenate(images).astype(np.float64), described["conv.input"]
    assert (found.low, found.high) == (values.min(), values.max())
    assert (found.mean, found.std) == pytest.approx((values.mean(), values.std()), rel=1e-6)
    past = np.abs(values - values.mean()) > 6 * values.std()
    assert found.outliers == past.mean()


def test_an_outlier_is_6_standard_deviations_from_the_mean() -> None:
    network, values = nn.Sequential(nn.Linear(1000, 1)), np.random.default_rng(0).normal(10, 1, (1, 1000)).astype(np.float32)
    values[0, :3] = (3, 15.5, 20)  # 20 is 10 past the mean; of a mean of 0 all others would be outliers, too
    (found, _) = activations(network, [values])
    distance = np.abs(values - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    assert sorted(distance[0])[-3] < 6 < sorted(distance[0])[-2]
    assert found.outliers == 2 / 1000


def test_channels_are_those_of_the_weight_over_all_images(described: dict[str, Activations], images: list[np.ndarray]) -> None:
    found = described["conv.input"]
    channels = np.abs(np.concatenate(images)).max((0, 2, 3))
    assert channels[4] > 4 * np.median(channels)
    assert found.imbalance == pytest.approx(channels.max() / np.median(channels))
    assert found.large_channels == pytest.approx(1 / 5)
    assert found.step_of_channel == pytest.approx((found.high - found.low) / 255 / np.median(channels))


def test_a_feature_map_and_its_tokens_have_the_same_channels(described: dict[str, Activations]) -> None:
    """A point's are its last axis, whatever is before it."""
    output, point, tokens = (described[place] for place in ("conv.output", "point", "linear.input"))
    assert (output.imbalance, output.step_of_channel) == pytest.approx((tokens.imbalance, tokens.step_of_channel))
    assert (point.imbalance, point.step_of_channel) == pytest.approx((tokens.imbalance, tokens.step_of_channel))


def test_a_step_is_of_a_range_with_zero() -> None:
    (found, _) = activations(nn.Sequential(nn.Linear(3, 2)), [np.array([[2, 4, 8]], np.float32)])
    assert (found.low, found.high) == (2, 8)
    assert found.step_of_channel == pytest.approx(8 / 255 / 4)


def test_activations_that_are_always_0() -> None:
    (found, _) = activations(nn.Sequential(nn.Linear(3, 2)), [np.zeros((4, 3), np.float32)])
    assert (found.std, found.outliers, found.step_of_channel, found.imbalance) == (0, 0, 0, 0)
