"""Ranges of activations by every method."""

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.ranges import _least_divergence, _least_error, _percentile, _rounded, observe
from gcvit_edge.recipe import RangeMethod

VALUES = np.random.default_rng(0).standard_normal(200_000)
BINS = 2048


def histogram(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    low, high = float(values.min()), float(values.max())
    return np.histogram(values, BINS, (low, high))[0].astype(float), low, high


def test_percentile_keeps_all_but_the_tails() -> None:
    low, high = _percentile(*histogram(VALUES))
    assert 1e-5 < np.mean((low > VALUES) | (high < VALUES)) < 2e-4


def test_least_error_is_no_worse_than_any_narrower_range() -> None:
    outlier = np.append(VALUES, 40.0)
    ends = _least_error(*histogram(outlier))
    assert ends[1] < 40
    error = np.square(_rounded(outlier, *ends) - outlier).mean()
    for part in (0.3, 0.5, 0.7, 1.0):
        assert error <= 1.02 * np.square(_rounded(outlier, outlier.min() * part, 40 * part) - outlier).mean()


def test_least_error_keeps_a_range_without_outliers() -> None:
    low, high = _least_error(*histogram(np.random.default_rng(0).uniform(-1, 1, 100_000)))
    assert (low, high) == pytest.approx((-1, 1), abs=0.05)


def test_least_error_cuts_outliers_on_one_side_alone() -> None:
    # most values are at GELU's lower end, -0.17
    values = torch.nn.functional.gelu(torch.from_numpy(np.append(np.tile(VALUES, 10), 12.0))).numpy()
    low, high = _least_error(*histogram(values))
    assert low == pytest.approx(values.min(), rel=0.05)
    assert 3 < high < 9
    both = np.square(_rounded(values, values.min(), values.max()) - values).mean()
    assert np.square(_rounded(values, low, high) - values).mean() < both / 2


def test_least_divergence_cuts_a_lonely_outlier() -> None:
    low, high = _least_divergence(*histogram(np.append(VALUES, 400.0)))
    assert high < 200
    assert low < -1


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (5.0, 6.0), (-6.0, -5.0), (0.0, 0.0)])
def test_least_divergence_of_values_on_one_side_of_zero(low: float, high: float) -> None:
    """A softmax over one key, say: what is scaled towards zero would leave none of them in range."""
    counts = np.ones(BINS) if high > low else np.eye(1, BINS)[0]
    ends = _least_divergence(counts, low, high)
    assert ends[0] >= low
    assert ends[1] <= high
    assert ends[0] <= ends[1]


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_places_that_hold_the_same_values_get_the_same_range(method: RangeMethod) -> None:
    """Else XNNPACK refuses to move integers between them, and OpenVINO rounds once for each."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.point, self.left, self.right = nn.Linear(64, 96), Point(), nn.Linear(700, 4), nn.Linear(700, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = self.point(self.linear(x).T)
            return self.left(turned) + self.right(turned)

    images = [np.random.default_rng(seed).standard_normal((700, 64)).astype(np.float32) for seed in range(3)]
    ranges = observe(Turned(), lambda: iter(images), method)
    assert ranges["linear.output"] == ranges["point"] == ranges["left.input"] == ranges["right.input"]


def test_methods_on_a_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    images = [np.random.default_rng(seed).standard_normal((50, 8)).astype(np.float32) for seed in range(4)]
    found = {method: observe(network, lambda: iter(images), method) for method in ("minmax", "average", "percentile", "mse", "entropy")}
    extremes = found["minmax"]
    assert extremes["0.input"] == (min(float(x.min()) for x in images), max(float(x.max()) for x in images))
    assert found["average"]["0.input"] == pytest.approx((np.mean([x.min() for x in images]), np.mean([x.max() for x in images])))
    for ranges in found.values():
        assert ranges.keys() == extremes.keys() == {"0.input", "0.output", "1.input", "1.output"}
        assert all(low >= extremes[place][0] - 1e-6 and high <= extremes[place][1] + 1e-6 for place, (low, high) in ranges.items())
    assert found["average"] != extremes


def test_least_divergence_of_mirrored_values_is_the_mirror() -> None:
    bins, low, high = histogram(np.random.default_rng(0).laplace(size=1_000_000))
    ends = _least_divergence(bins, low, high)
    assert _least_divergence(bins[::-1], -high, -low) == pytest.approx((-ends[1], -ends[0]))
