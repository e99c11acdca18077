"""Rounding of weights layer after layer, each fitted to the float network's outputs from what the rounded layers before it hand on.

`reconstruct` makes good a layer's own errors alone; here a layer also makes good what those before it have left (asymmetric calibration,
GPTAQ, arXiv:2504.02692). The network is taken block by block (`model.deploy.parts`), float and rounded side by side. It pays for INT4
(0.6 to 1 dB, for a minute of an XXT's time); INT8 leaves too little to make good (benchmarks/NOTES.md).
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gcvit_edge.model.deploy.parts import Part, State, parts
from gcvit_edge.quantization.ranges import Images
from gcvit_edge.quantization.rounding import DAMPING, Dense, Grids, compensated, dense_layers, rows_read
from gcvit_edge.quantization.watch import watching

States = Sequence[tuple[State, State]]
"""Of every image, what a part is given in the float network, and in the rounded one."""


@torch.no_grad()
def reconstruct_in_turn(deployed: nn.Module, images: Images, grids: Grids) -> None:
    """Rounds the weights of these linears and convolutions of what `deploy` gave, in place; those of depthwise ones stay."""
    reference, everything = copy.deepcopy(deployed), dense_layers(deployed, grids)
    states: States = [(state, state) for state in ((torch.from_numpy(image),) for image in images())]
    for before, after in zip(parts(reference), parts(deployed), strict=True):
        layers = {name: layer for name, layer in everything.items() if name.startswith(after.layers)}
        for turn in _turns(after, layers, states[0][1]):
            _fit({name: layers[name] for name in turn}, reference, before, after, states, grids)
        states = [_handed_on(before, after, clean, noisy, bool(layers)) for clean, noisy in states]


def _handed_on(before: Part, after: Part, clean: State, noisy: State, rounded: bool) -> tuple[State, State]:
    """What both networks hand to the next part: one tensor for both until a layer is rounded, feature maps being large."""
    state = before.run(clean)
    return state, (state if noisy is clean and not rounded else after.run(noisy))


def _turns(part: Part, layers: dict[str, Dense], state: State) -> list[list[str]]:
    """The layers in the order in which they run; those that read the same tensor one after the other, such as q, k and v, together."""
    turns: list[list[str]] = []
    read: list[Tensor] = []  # by the last one

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if read and x is read[0]:
            turns[-1].append(name)
        else:
            turns.append([name])
        read[:] = [x]

    with watching(layers, see):
        part.run(state)
    return turns


def _fit(layers: dict[str, Dense], reference: nn.Module, before: Part, after: Part, states: States, grids: Grids) -> None:
    """Rounds layers that read the same inputs, x: their weights first go to those of least squared error of the float network's outputs.

    The change is D (X^T X + r I)^-1, with D the sum of what is missing in the outputs times the inputs: a ridge regression, whose r
    grows with the number of weights for each row. Without it the head, which sees one row an image, would learn the images by heart.
    """
    floats = {name: reference.get_submodule(name) for name in layers}
    wanted: dict[str, Tensor] = {}
    first = next(iter(layers))
    inputs = layers[first].weight[0].numel()
    product, count = torch.zeros(inputs, inputs), 0
    missing = {name: torch.zeros(len(layer.weight), inputs) for name, layer in layers.items()}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal count
        rows = rows_read(layers[name], x)
        if name == first:
            product.addmm_(rows.T, rows)
            count += len(rows)
        left = wanted[name] - y
        left = left.flatten(0, -2) if isinstance(layers[name], nn.Linear) else left.permute(0, 2, 3, 1).flatten(0, 2)
        missing[name].addmm_(left.T, rows)

    for clean, noisy in states:
        with watching(floats, lambda name, x, y: wanted.update({name: y})):
            before.run(clean)
        with watching(layers, add):
            after.run(noisy)
    ridge = (max(DAMPING, inputs / count) * product.diagonal().mean()).clamp_min(1e-8)
    factor = torch.linalg.cholesky(product + ridge * torch.eye(inputs))
    for name, layer in layers.items():
        weight = layer.weight + torch.cholesky_solve(missing[name].T, factor).T.reshape(layer.weight.shape)
        layer.weight.copy_(compensated(weight, product, grids[name](weight)))
