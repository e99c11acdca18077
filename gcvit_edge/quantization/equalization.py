"""Equalization: channels of outputs get one range, exactly. Rows of weights have scales of their own, so nothing pays for it and nothing
is searched (cross-layer equalization, arXiv:1906.04721, where what is between two layers lets a factor through):

- q and k of local attention, whose products do not change;
- proj and fc2, with a factor by channel behind them (`Gain`), for kernels that answer in integers.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gcvit_edge.model.deploy import Attention, Block, Gain
from gcvit_edge.model.deploy.folding import scale_rows
from gcvit_edge.quantization.channels import extremes, highest, scales


def outputs(deployed: nn.Module) -> Iterator[tuple[str, nn.Linear, Gain]]:
    """Layers whose outputs have a factor by channel behind them, with their names."""
    for name, module in deployed.named_modules():
        if isinstance(module, Block):
            yield f"{name}.attention.proj", module.attention.proj, module.residual1.gain
            yield f"{name}.fc2", module.fc2, module.residual2.gain


@torch.no_grad()
def equalize(deployed: nn.Module, images: Iterable[NDArray[np.float32]]) -> None:
    """Scales outputs of a deploy form in place, as `Form()` writes it. images: each (B, C, H, W); the first 32 are used."""
    pairs = {name: module for name, module in deployed.named_modules() if isinstance(module, Attention) and module.q is not None}
    layers = {f"{name}.{part}": module.get_submodule(part) for name, module in pairs.items() for part in ("q", "k")}
    ends = extremes(deployed, layers | {name: layer for name, layer, _ in outputs(deployed)}, images)
    for name, layer, gain in outputs(deployed):
        magnitude = highest(ends[name])
        scale = scales(magnitude, torch.ones_like(magnitude), 1.0)
        scale_rows(layer, 1 / scale)
        gain.value *= scale
    for name, attention in pairs.items():
        scale = scales(highest(ends[f"{name}.q"]), highest(ends[f"{name}.k"]), 0.5)
        scale_rows(attention.get_submodule("q"), 1 / scale)  # type: ignore[arg-type]
        scale_rows(attention.k, scale)
