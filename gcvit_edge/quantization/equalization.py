"""Equalization: channels of outputs get one range, exactly. Rows of weights have scales of their own, so nothing pays for it and nothing
is searched (cross-layer equalization, arXiv:1906.04721, where what is between two layers lets a factor through):

- q and k of local attention, whose products do not change;
- proj and fc2, with a factor by channel behind them (`Gain`), for kernels that answer in integers;
- the residual stream of a stage, for additions in integers: what writes it has the factor, the norms that read it undo it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gcvit_edge.model.deploy import Attention, Block, Gain, RMSNorm
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


@torch.no_grad()
def equalize_streams(deployed: nn.Module, images: Iterable[NDArray[np.float32]]) -> None:
    """Scales the residual streams of a deploy form in place, as `Form()` writes it. images: as for `equalize`. Norms that are operators
    need a multiplication before them then, so it is for additions in integers alone."""
    found = list(streams(deployed))
    ends = extremes(deployed, {name: point for stream in found for name, point in stream.points.items()}, images)
    for stream in found:
        magnitude = torch.stack([highest(ends[name]) for name in stream.points]).amax(0)
        scale = scales(magnitude, torch.ones_like(magnitude), 1.0)
        for gain in stream.writers:
            gain.value /= scale
        for norm in stream.readers:
            norm.gain.value *= scale


@dataclass(frozen=True)
class Stream:
    """The residual stream of a stage. points: where it can be seen, by name. writers: factors of what is added to it. readers: norms."""

    points: dict[str, nn.Module]
    writers: list[Gain]
    readers: list[RMSNorm]


def streams(deployed: nn.Module) -> Iterator[Stream]:
    """Those of all stages; what leaves a stage is read by the next one's first norm, or the one before the head."""
    network = cast(Any, deployed)
    after = [*(stage.downsample.norm1 for stage in network.stages[1:]), network.norm]
    for index, (stage, norm) in enumerate(zip(network.stages, after, strict=True)):
        residuals = {f"stages.{index}.blocks.{i}.{name}": block.get_submodule(name)
                     for i, block in enumerate(stage.blocks) for name in ("residual1", "residual2")}  # fmt: skip
        yield Stream(
            points={f"stages.{index}.gain": stage.gain, **{f"{name}.sum": residual.sum for name, residual in residuals.items()}},
            writers=[stage.gain, *(residual.gain for residual in residuals.values())],
            readers=[*(each for block in stage.blocks for each in (block.norm1, block.norm2)), norm],
        )
