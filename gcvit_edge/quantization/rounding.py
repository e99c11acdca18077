"""Rounding of weights that sees what they are multiplied with.

- `reconstruct`: the weights of a layer are rounded one input channel after the other, and the error of each is made good by the channels
  that are still float, for the least squared error of the layer's outputs on the calibration images (GPTQ, arXiv:2210.17323).
- `correct_biases`: the mean error that rounding leaves in a layer's outputs goes into its bias (arXiv:1906.04721, section 4.2).

Both change float parameters only: rounded weights lie on the grid that `IntegerWeight`, `GroupedWeight` and `HalfWeight` find again, so
that every backend rounds to the same values.
"""

from collections.abc import Callable, Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.quantization.integers import GroupedWeight, HalfWeight, IntegerWeight
from gcvit_edge.quantization.ranges import Images
from gcvit_edge.quantization.watch import show, watching

Dense = nn.Linear | nn.Conv2d
Rounded = IntegerWeight | GroupedWeight | HalfWeight
Grid = Callable[[Tensor], Rounded]
Grids = Mapping[str, Grid]
"""How the weights of these layers, by name, are rounded."""

DAMPING = 0.01  # of the mean of the Hessian's diagonal, for channels that are always near 0
_BLOCK = 128  # channels at a time, so that far ones are touched once a block


@torch.no_grad()
def reconstruct(deployed: nn.Module, images: Images, grids: Grids) -> None:
    """Rounds the weights of these linears and convolutions, in place; those of depthwise ones, which add up 9 products each, stay."""
    layers = dense_layers(deployed, grids)
    products = {name: torch.zeros(layer.weight[0].numel(), layer.weight[0].numel()) for name, layer in layers.items()}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        rows = rows_read(layers[name], x)
        products[name].addmm_(rows.T, rows)

    with watching(layers, add):
        for image in images():
            show(deployed, image)
    for name, layer in layers.items():
        layer.weight.copy_(compensated(layer.weight, products[name], grids[name](layer.weight)))


@torch.no_grad()
def correct_biases(deployed: nn.Module, images: Images, grids: Grids) -> None:
    """Adds the mean error of outputs to the biases of those of these layers that are linears, in place."""
    modules = ((name, module) for name, module in deployed.named_modules() if name in grids)
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear) and module.bias is not None}
    sums = {name: torch.zeros(layer.in_features) for name, layer in linears.items()}
    rows = dict.fromkeys(linears, 0)

    def add(name: str, x: Tensor, y: Tensor) -> None:
        sums[name] += x.sum(0)
        rows[name] += len(x)

    with watching(linears, add):
        for image in images():
            show(deployed, image)
    for name, layer in linears.items():
        layer.bias.add_((layer.weight - grids[name](layer.weight)()) @ (sums[name] / rows[name]))


def dense_layers(deployed: nn.Module, grids: Grids) -> dict[str, Dense]:
    """The linears and convolutions whose weights are rounded for what they are multiplied with, in the order of the network."""
    return {name: layer for name, layer in deployed.named_modules() if name in grids and _is_dense(layer)}


def _is_dense(layer: nn.Module) -> TypeGuard[Dense]:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def rows_read(layer: Dense, x: Tensor) -> Tensor:
    """What the outputs of a layer are products of (rows, in): of a convolution the pixels under its kernel."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]


def _factor_of_inverse(product: Tensor) -> Tensor:
    """The upper triangular U (in, in) with U^T U = product^-1."""
    factor, failed = torch.linalg.cholesky_ex(product)
    inverse, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed or failed_too:  # inputs are so much alike that their product is not positive in float32
        factor = torch.linalg.cholesky(product.double())
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    return inverse


def compensated(weight: Tensor, product: Tensor, grid: Rounded) -> Tensor:
    """The weight (out, ...) on its grid, the error of each input channel made good by those after it. product: sum of x^T x (in, in) of
    what `rows_read` gives."""
    order = product.diagonal().argsort(descending=True)  # what matters most first, while most can make good its errors
    left, fixed = weight.flatten(1)[:, order], grid.fixed()
    product = product[order][:, order]
    product = product + torch.eye(len(product)) * (DAMPING * product.diagonal().mean()).clamp_min(1e-8)
    inverse = _factor_of_inverse(product)
    result = grid().flatten(1)
    for start in range(0, len(order), _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = torch.zeros_like(left[:, block])
        for index in range(start, start + errors.shape[1]):
            channel = int(order[index])
            nearest = grid.nearest(left[:, index], channel, result)
            result[:, channel] = torch.where(fixed[:, channel], result[:, channel], nearest)
            errors[:, index - start] = (left[:, index] - result[:, channel]) / inverse[index, index]
            left[:, index : block.stop] -= errors[:, index - start, None] * inverse[index, index : block.stop]
        left[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return result.view_as(weight)
