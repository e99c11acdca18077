"""A network that answers with what its layers give, too, so that one can see in a runtime where an artifact departs from float.

All of it is one row, (1, M): whatever runs logits runs it, in every runtime, and an exporter sees a graph like any other. What a
runtime fuses across a layer's output may differ from the artifact without taps; how far the logits differ says so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.quantization.watch import watching

_AT_ONCE = 4  # tensors that XNNPACK concatenates in one operator; it takes five at most


class _Tapped(nn.Module):
    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, image: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            return lambda module, inputs, output: seen.update({name: output.reshape(1, -1)})

        handles = [self.network.get_submodule(name).register_forward_hook(note(name)) for name in self.names]
        try:
            rows = [self.network(image)]
        finally:
            for handle in handles:
                handle.remove()
        rows += [seen[name] for name in self.names]
        while len(rows) > 1:
            groups = [rows[at : at + _AT_ONCE] for at in range(0, len(rows), _AT_ONCE)]
            rows = [torch.cat(group, 1) if len(group) > 1 else group[0] for group in groups]
        return rows[0]


def tapped(network: nn.Module, names: Sequence[str], example: Tensor) -> nn.Module:
    """(1, C, H, W) -> (1, M): the logits of `network`, then the outputs of these layers, as a graph without hooks."""
    return torch.export.export(_Tapped(network, names).eval(), (example,), strict=False).module(check_guards=False)


@torch.no_grad()
def sizes(network: nn.Module, names: Sequence[str], example: Tensor) -> list[int]:
    """How many numbers of the row are the logits', then each layer's."""
    seen: dict[str, int] = {}

    with watching({name: network.get_submodule(name) for name in names}, lambda name, x, y: seen.update({name: y.numel()})):
        logits = network(example).numel()
    return [logits, *(seen[name] for name in names)]


def split(rows: NDArray[np.float32], widths: Sequence[int]) -> list[NDArray[np.float32]]:
    """Of rows (N, M): the logits (N, classes), then each layer's output (N, numbers)."""
    return np.split(rows, np.cumsum(widths)[:-1], axis=1)
