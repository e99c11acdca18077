"""Centring: the range of every channel of keys and values is moved around 0, exactly, so that none is wider than it must be.

The softmax does not see what is added to all keys, and what is added to all values comes out of attention as it went in, so that the
bias of proj takes it back. (Symmetric keys and values, whose zero point is 0, then lose nothing.)
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gcvit_edge.model.deploy import Attention
from gcvit_edge.quantization.channels import extremes


@torch.no_grad()
def centre(deployed: nn.Module, images: Iterable[NDArray[np.float32]]) -> None:
    """Changes biases of k, v and proj of a deploy form in place. images: each (B, C, H, W); the first 32 are used."""
    attentions = {name: module for name, module in deployed.named_modules() if isinstance(module, Attention)}
    layers = {f"{name}.{part}": module.get_submodule(part) for name, module in attentions.items() for part in ("k", "v")}
    ends = extremes(deployed, layers, images)
    for name, attention in attentions.items():
        attention.k.bias.sub_(sum(ends[f"{name}.k"]) / 2)
        middle = sum(ends[f"{name}.v"]) / 2
        attention.v.bias.sub_(middle)
        attention.proj.bias.add_(attention.proj.weight @ middle)
