"""Rounding of weights that sees what they are multiplied with.

- `reconstruct`: INT4 weights are rounded one input channel after the other, and the error of each is made good by the channels that
  are still float, for the least squared error of the layer's outputs on the calibration images (GPTQ, arXiv:2210.17323, which is
  the closed form of AdaRound's layer reconstruction, arXiv:2004.10568, one weight at a time).
- `correct_biases`: the mean error that rounding leaves in a layer's outputs goes into its bias (arXiv:1906.04721, section 4.2).

Both change float parameters only: rounded weights lie on the grid that `GroupedWeight` finds again, so that every backend rounds to the
same integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gcvit_edge.quantization.integers import GroupedWeight
from gcvit_edge.quantization.ranges import Images
from gcvit_edge.quantization.watch import watching

_DAMPING = 0.01  # of the mean of the Hessian's diagonal, for channels that are always near 0


@torch.no_grad()
def reconstruct(deployed: nn.Module, images: Images, chosen: Callable[[str], bool]) -> None:
    """Rounds the weights of the linears whose names are `chosen` to INT4, in place."""
    linears = {name: module for name, module in deployed.named_modules() if isinstance(module, nn.Linear) and chosen(name)}
    products = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in linears.items()}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        products[name].addmm_(x.T, x)

    with watching(linears, add):
        for image in images():
            deployed(torch.from_numpy(image))
    for name, layer in linears.items():
        layer.weight.copy_(_rounded(layer.weight, products[name]))


@torch.no_grad()
def correct_biases(deployed: nn.Module, images: Images, rounded: Callable[[str, Tensor], Tensor]) -> None:
    """Adds the mean error of outputs to the biases of linears, in place. rounded: the weight that a layer of this name will have."""
    linears = {name: module for name, module in deployed.named_modules() if isinstance(module, nn.Linear) and module.bias is not None}
    sums = {name: torch.zeros(layer.in_features) for name, layer in linears.items()}
    rows = dict.fromkeys(linears, 0)

    def add(name: str, x: Tensor, y: Tensor) -> None:
        sums[name] += x.sum(0)
        rows[name] += len(x)

    with watching(linears, add):
        for image in images():
            deployed(torch.from_numpy(image))
    for name, layer in linears.items():
        layer.bias.add_((layer.weight - rounded(name, layer.weight)) @ (sums[name] / rows[name]))


def _rounded(weight: Tensor, product: Tensor) -> Tensor:
    """The weight (out, in) on the grid of `GroupedWeight`; product: sum of x^T x (in, in) of its inputs."""
    grid = GroupedWeight(weight)
    scale = grid.scale.repeat_interleave(GroupedWeight.GROUP, 1)
    product = product + torch.eye(len(product)) * (_DAMPING * product.diagonal().mean()).clamp_min(1e-8)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(product)), upper=True)
    left, result = weight.clone(), torch.empty_like(weight)
    size = GroupedWeight.GROUP
    for start in range(0, weight.shape[1], size):  # in blocks, so that far channels are touched once a block
        block = slice(start, start + size)
        errors = torch.empty(len(weight), size)
        for index in range(start, start + size):
            step = scale[:, index]
            result[:, index] = torch.clamp(torch.round(left[:, index] / step), -8, 7) * step
            errors[:, index - start] = (left[:, index] - result[:, index]) / inverse[index, index]
            left[:, index:][:, : start + size - index] -= errors[:, index - start, None] * inverse[index, index : start + size]
        left[:, start + size :] -= errors @ inverse[block, start + size :]
    return result
