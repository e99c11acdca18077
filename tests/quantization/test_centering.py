"""Centring: exact, and the middle of every channel of keys and values is 0."""

import copy

import pytest
import torch
from channel_checks import IMAGES
from torch import nn

from gcvit_edge.model.deploy import Attention
from gcvit_edge.quantization.centering import centre
from gcvit_edge.quantization.channels import extremes


@pytest.fixture(scope="module")
def centred(deployed: nn.Module) -> nn.Module:
    network = copy.deepcopy(deployed)
    centre(network, IMAGES)
    return network


@torch.no_grad()
def test_keys_and_values_are_centred(deployed: nn.Module, centred: nn.Module) -> None:
    def furthest(network: nn.Module) -> float:
        attentions = {name: module for name, module in network.named_modules() if isinstance(module, Attention)}
        layers = {f"{name}.{part}": getattr(module, part) for name, module in attentions.items() for part in ("k", "v")}
        ends = extremes(network, layers, IMAGES)
        assert len(ends) == 2 * 7
        return max(float((low + high).abs().max() / high.abs().max()) for low, high in ends.values())

    assert furthest(centred) < 1e-3 < 0.1 < furthest(deployed)
