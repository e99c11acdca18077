"""Smoothing: exact, and worth it."""

import copy

import numpy as np
import pytest
import torch
from channel_checks import IMAGES, logits
from torch import nn

from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import Block, Downsample, MBConv, RMSNorm
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.channels import extremes, highest, scales
from gcvit_edge.quantization.integers import Affine, IntegerWeight
from gcvit_edge.quantization.layers import StaticLayer
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import quantize
from gcvit_edge.quantization.smoothing import STRENGTHS, _error, places, smooth

STATIC = Arithmetic(activations="int8", delicate="static", linear_output=True)


@pytest.fixture(scope="module")
def smoothed(deployed: nn.Module) -> nn.Module:
    network = copy.deepcopy(deployed)
    chosen = smooth(network, IMAGES)
    assert set(chosen) == {place.name for place in places(network)}
    assert set(chosen.values()) <= set(STRENGTHS)
    assert len(set(chosen.values())) > 1
    return network


def test_int8_is_more_exact(deployed: nn.Module, smoothed: nn.Module) -> None:
    noise = []
    for network in (deployed, smoothed):
        ranges = observe(network, lambda: iter(IMAGES))
        noise.append(sqnr_db(logits(quantize(network, frozenset({"linear", "conv"}), STATIC, ranges)), logits(deployed)))
    assert noise[1] > noise[0] + 1


def test_nothing_is_scaled_at_strength_0(deployed: nn.Module) -> None:
    network = copy.deepcopy(deployed)
    smooth(network, IMAGES, strengths=(0.0,))
    before = deployed.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_place_where_a_linear_writes_what_another_reads(deployed: nn.Module) -> None:
    blocks = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate((2, 2, 2, 1)) for block in range(depth)]
    convolutions = [name for name, module in deployed.named_modules() if isinstance(module, MBConv)]
    assert {place.name for place in places(deployed)} == {
        *(f"{block}.{part}" for block in blocks for part in ("norm1", "attention.proj", "norm2")),
        *(f"stages.{stage}.downsample.reduction" for stage in range(4)),
        *(f"{name}.pointwise" for name in convolutions),
        "norm",
    }
    assert len(convolutions) > 8


@torch.no_grad()
def test_scales_are_those_of_all_readers_and_images(deployed: nn.Module) -> None:
    network = copy.deepcopy(deployed)
    smooth(network, IMAGES[:2], strengths=(0.5,))
    for name, block in deployed.named_modules():
        if isinstance(block, Block):
            readers = [each for each in (block.attention.q, block.attention.k, block.attention.v) if each is not None]
            magnitude = highest(extremes(deployed, {name: block.norm1}, IMAGES[:2])[name])
            largest = torch.cat([reader.weight for reader in readers]).abs().amax(0)
            torch.testing.assert_close(network.get_submodule(f"{name}.norm1").weight, block.norm1.weight / scales(magnitude, largest, 0.5))
        elif isinstance(block, Downsample):
            magnitude = highest(extremes(deployed, {name: block.conv_block}, IMAGES[:2])[name])
            scale = scales(magnitude, block.reduction.weight.abs().amax((0, 2, 3)), 0.5)
            torch.testing.assert_close(network.get_submodule(f"{name}.norm1").weight, block.norm1.weight / scale)


class Last(nn.Module):
    """What is behind the last stage, of which the only place is the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


@pytest.mark.parametrize("outlier", [1.0, 4.0, 60.0])
@torch.no_grad()
def test_the_strength_is_that_of_least_noise(outlier: float) -> None:
    torch.manual_seed(0)
    network, images = Last(), [np.random.default_rng(seed).standard_normal((200, 32)).astype(np.float32) for seed in range(3)]
    network.norm.weight[::9] *= outlier
    network.head.weight[3] *= 5
    x = torch.from_numpy(np.concatenate(images))

    def noise(strength: float) -> float:
        smoothed = copy.deepcopy(network)
        assert smooth(smoothed, images, (strength,)) == {"norm": strength}
        torch.testing.assert_close(smoothed(x), network(x), rtol=1e-4, atol=1e-4)
        read = smoothed.norm(x)
        rounded = StaticLayer(smoothed.head, Affine.of_range(float(read.min()), float(read.max()), "int8"), None)
        return float((rounded(read) - network(x)).square().sum())

    found = {strength: noise(strength) for strength in STRENGTHS}
    chosen = smooth(network, images)["norm"]
    assert found[chosen] == pytest.approx(min(found.values()), rel=1e-3)
    assert max(found.values()) > 1.05 * found[chosen]


@torch.no_grad()
def test_error_is_of_rounded_activations_and_weights_of_all_readers() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(100, 8) * torch.logspace(-1, 1, 8), torch.logspace(-0.5, 0.5, 8)
    weights = [torch.randn(6, 8), torch.randn(4, 8)]
    shrunk = x / scale
    rounded = Affine.of_range(float(shrunk.min()), float(shrunk.max()), "int8").round_trip(shrunk)
    both = torch.cat([rounded @ IntegerWeight(weight * scale)().T - x @ weight.T for weight in weights], 1)
    assert _error(x, weights, scale) == pytest.approx(float(both.square().sum()), rel=1e-4)
