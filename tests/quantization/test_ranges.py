"""Ranges of activations by every method."""

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.model.deploy import Point
from gcvit_edge.quantization.integers import Affine
from gcvit_edge.quantization.ranges import _histograms, _least_divergence, _least_error, _percentile, _rounded, observe
from gcvit_edge.recipe import RangeMethod

VALUES = np.random.default_rng(0).standard_normal(200_000)
BINS = 2048


def histogram(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    low, high = float(values.min()), float(values.max())
    return np.histogram(values, BINS, (low, high))[0].astype(float), low, high


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, 0.5), (0.0, 7.0), (2.0, 7.0), (-7.0, -2.0), (-0.17, 6.0)])
def test_rounding_is_that_of_the_runtimes(low: float, high: float) -> None:
    values = np.linspace(min(low, 0) - 1, max(high, 0) + 1, 1999)
    expected = Affine.of_range(low, high, "uint8").round_trip(torch.from_numpy(values).float()).numpy()
    rounded = _rounded(values, low, high)
    assert len(np.unique(rounded)) == 256
    assert np.mean(np.abs(rounded - expected) > 1e-5) < 0.01  # ties, which float32 decides


@torch.no_grad()
def test_counts_are_those_of_all_values_of_all_images() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    images = [np.random.default_rng(seed).normal(2, 1 + seed, (500, 4)).astype(np.float32) for seed in range(3)]
    values = np.concatenate(images)
    ranges = {"0.input": (float(values.min()), float(values.max()))}
    counts = _histograms(network, lambda: iter(images), ranges)
    assert counts.keys() == ranges.keys()
    expected = np.histogram(values, BINS, ranges["0.input"])[0]
    assert counts["0.input"].sum() == values.size
    assert counts["0.input"][0] >= 1
    assert counts["0.input"][-1] >= 1  # the ends themselves
    assert np.abs(np.cumsum(counts["0.input"]) - np.cumsum(expected)).max() <= 3  # at the edge of a bin float32 decides


@torch.no_grad()
def test_a_place_that_holds_one_value_is_counted() -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    counts = _histograms(network, lambda: iter([np.full((5, 4), 2, np.float32)]), {"0.input": (2.0, 2.0)})
    assert counts["0.input"][0] == counts["0.input"].sum() == 20


def test_places_that_are_not_asked_for_are_not_observed() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    images = [np.ones((2, 4), np.float32)]
    assert observe(network, lambda: iter(images), "mse", places=["0.output"]).keys() == {"0.output"}
    assert observe(network, lambda: iter(images), "mse", places=[]) == {}


def test_percentile_leaves_a_twenty_thousandth_outside_at_either_end() -> None:
    counts = np.full(BINS, 5_000_000 / BINS)
    counts[:2] = counts[-2:] = 0.00003 * counts.sum()  # one bin less than the tail, two more
    assert _percentile(counts, -4, 4) == pytest.approx((-4 + 8 / BINS, 4 - 8 / BINS), abs=1e-9)


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


@pytest.mark.parametrize("outlier", [40.0, -40.0])
def test_least_error_is_the_least_of_either_end(outlier: float) -> None:
    counts, low, high = histogram(np.append(VALUES, outlier))
    values = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    ends = _least_error(counts, low, high)

    def error(low: float, high: float) -> float:
        return float(counts @ np.square(_rounded(values, low, high) - values))

    parts = np.linspace(1, 0.2, 41)
    assert any(ends[0] == pytest.approx(low * part) for part in parts)
    assert any(ends[1] == pytest.approx(high * part) for part in parts)
    assert error(*ends) <= min(error(low * part, ends[1]) for part in parts)
    assert error(*ends) < 0.8 * error(low, high)
    assert max(-ends[0], ends[1]) < 35


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


def test_least_divergence_counts_what_is_cut_off() -> None:
    """At the end that it is cut off at, where the rounded distribution has none of it: not even a tenth of all values is free to lose."""
    values = np.concatenate([np.random.default_rng(1).uniform(-1, 1, 100_000), np.random.default_rng(2).uniform(2.9, 3, 10_000)])
    _, high = _least_divergence(*histogram(values))
    assert high > 2.9


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
