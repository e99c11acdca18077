"""Smoothing: exact, and worth it."""

import copy

import pytest
import torch
from channel_checks import IMAGES, logits
from torch import nn

from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import quantize
from gcvit_edge.quantization.smoothing import STRENGTHS, places, smooth

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
