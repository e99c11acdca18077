"""Rounding of weights by reconstruction, and biases."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gcvit_edge.quantization.integers import GroupedWeight, HalfWeight, IntegerWeight
from gcvit_edge.quantization.rounding import correct_biases, reconstruct


def correlated(rows: int, channels: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.standard_normal((rows, channels // 4)) @ generator.standard_normal((channels // 4, channels)) + 1).astype(np.float32)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48))


def test_grouped_weight_is_its_integers() -> None:
    torch.manual_seed(0)
    weight = GroupedWeight(torch.randn(6, 96))
    assert weight.values.dtype == torch.int8
    assert int(weight.values.min()) >= -8
    assert int(weight.values.max()) <= 7
    assert weight.scale.shape == (6, 3)
    torch.testing.assert_close(weight(), weight.values.float() * weight.scale.repeat_interleave(32, 1))
    torch.testing.assert_close(weight.scale, weight.scale.bfloat16().float(), rtol=0, atol=0)


def test_grouped_weight_finds_its_grid_again() -> None:
    torch.manual_seed(0)
    first = GroupedWeight(torch.randn(64, 128))
    torch.testing.assert_close(GroupedWeight(first())(), first(), rtol=0, atol=0)


def test_grouped_weight_wants_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32 input channels, got 40"):
        GroupedWeight(torch.randn(4, 40))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_weight(dtype: torch.dtype, error: float) -> None:
    weight = torch.randn(5, 7)
    half = HalfWeight(weight, dtype)
    assert half.values.dtype == dtype
    assert half().dtype == torch.float32
    torch.testing.assert_close(half(), weight, rtol=error, atol=1e-6)


GRIDS = pytest.mark.parametrize("grid", [IntegerWeight, GroupedWeight])


HALF = partial(HalfWeight, dtype=torch.bfloat16)


@GRIDS
def test_reconstruction_beats_nearest_rounding_and_stays_on_the_grid(network: nn.Module, grid: type[IntegerWeight | GroupedWeight]) -> None:
    x = correlated(500, 64)
    expected = network(torch.from_numpy(x))
    plain, rebuilt = copy.deepcopy(network), copy.deepcopy(network)
    plain[0].weight.data = grid(plain[0].weight)()
    reconstruct(rebuilt, lambda: iter([x]), {"0": grid})
    found = grid(rebuilt[0].weight)
    torch.testing.assert_close(found(), rebuilt[0].weight.data, rtol=0 if grid is GroupedWeight else 1e-6, atol=0)
    torch.testing.assert_close(found.scale, grid(network[0].weight).scale)
    errors = [float((each(torch.from_numpy(x)) - expected).square().mean().detach()) for each in (rebuilt, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(7, 12, 3, padding=1)])
def test_integers_keep_their_bounds(layer: nn.Linear | nn.Conv2d) -> None:
    """Values of neighbouring channels add up to at most 128, whatever they make good; scales stay those of the weights."""
    torch.manual_seed(0)
    nn.init.uniform_(layer.weight, -1, 1)  # many pairs near the bound
    before = IntegerWeight(layer.weight)
    channels = layer.weight.shape[1]
    x = correlated(256, 64)[:, :channels]
    image = x if isinstance(layer, nn.Linear) else x.reshape(4, 8, 8, channels).transpose(0, 3, 1, 2).copy()
    reconstruct(nn.Sequential(layer), lambda: iter([image]), {"0": IntegerWeight})
    values = torch.round(layer.weight.reshape(len(layer.weight), channels, -1) / before.scale.view(-1, 1, 1)).int()
    assert (values.flatten(1) != before.values.flatten(1)).any()
    assert (values[:, : channels // 2 * 2 : 2] + values[:, 1::2]).abs().max() == 128
    assert values.abs().max() <= 127
    torch.testing.assert_close(IntegerWeight(layer.weight).scale, before.scale)


def test_half_weights_are_reconstructed(network: nn.Module) -> None:
    x = correlated(500, 64)
    expected = network(torch.from_numpy(x))
    plain, rebuilt = copy.deepcopy(network), copy.deepcopy(network)
    plain[0].weight.data = HALF(plain[0].weight)()
    reconstruct(rebuilt, lambda: iter([x]), {"0": HALF})
    torch.testing.assert_close(HALF(rebuilt[0].weight)(), rebuilt[0].weight.data, rtol=0, atol=0)
    errors = [float((each(torch.from_numpy(x)) - expected).square().mean().detach()) for each in (rebuilt, plain)]
    assert errors[0] < 0.5 * errors[1]


@GRIDS
def test_channels_that_are_alike_or_dead_are_no_obstacle(network: nn.Module, grid: type[IntegerWeight | GroupedWeight]) -> None:
    x = correlated(500, 64)
    x[:, 1:32] = x[:, :1]
    x[:, 40:50] = 0
    reconstruct(network, lambda: iter([1e4 * x]), {"0": grid})
    assert network[0].weight.isfinite().all()
    torch.testing.assert_close(grid(network[0].weight)(), network[0].weight.data, rtol=1e-6, atol=0)


def test_depthwise_convolutions_stay() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    before = network[0].weight.clone()
    reconstruct(network, lambda: iter([correlated(64, 8).T.reshape(1, 8, 8, 8).copy()]), {"0": HALF})
    torch.testing.assert_close(network[0].weight.data, before, rtol=0, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_reconstructed_for_the_pixels_that_they_read(stride: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 12, 3, stride, padding=1))
    x = correlated(2 * 16 * 16, 8).reshape(2, 16, 16, 8).transpose(0, 3, 1, 2).copy()
    expected = network(torch.from_numpy(x))
    plain, rebuilt = copy.deepcopy(network), copy.deepcopy(network)
    plain[0].weight.data = IntegerWeight(plain[0].weight)()
    reconstruct(rebuilt, lambda: iter([x]), {"0": IntegerWeight})
    torch.testing.assert_close(IntegerWeight(rebuilt[0].weight)(), rebuilt[0].weight.data, rtol=1e-6, atol=0)
    errors = [float((each(torch.from_numpy(x)) - expected).square().mean().detach()) for each in (rebuilt, plain)]
    assert errors[0] < 0.5 * errors[1]


def textbook(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """GPTQ in bfloat16 as its paper defines it, with an inverse for every step: weight (out, in), rows (n, in)."""
    left, rows = weight.double().clone(), rows.double()
    product = rows.T @ rows
    order = product.diagonal().argsort(descending=True)
    product += 0.01 * product.diagonal().mean() * torch.eye(len(product))
    for step in range(len(order)):
        rest = order[step:]
        inverse = torch.linalg.inv(product[rest][:, rest])
        rounded = left[:, rest[0]].bfloat16().double()
        left[:, rest] -= ((left[:, rest[0]] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        left[:, rest[0]] = rounded
    return left.float()


@pytest.mark.parametrize("layer", [nn.Linear(288, 8), nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(32, 8, 3, stride=2, padding=1)])
@torch.no_grad()
def test_reconstruction_is_that_of_its_paper_over_all_images_and_channels(layer: nn.Linear | nn.Conv2d) -> None:
    """Of more channels than are made good at a time, some of them larger than others."""
    torch.manual_seed(0)
    nn.init.uniform_(layer.weight, -1, 1)
    is_linear = isinstance(layer, nn.Linear)
    images = [torch.randn(300, 288) if is_linear else torch.randn(2, 32, 12, 12) for _ in range(2)]
    images = [image + image.roll(1, 1) for image in images]
    images[0] *= torch.linspace(0.5, 2, images[0].shape[1]).view(-1, *[1] * (images[0].ndim - 2))
    if is_linear:
        rows = torch.cat(images)
    else:
        pixels = F.pad(torch.cat(images), (1, 1, 1, 1)).unfold(2, 3, layer.stride[0]).unfold(3, 3, layer.stride[0])
        rows = pixels.permute(0, 2, 3, 1, 4, 5).reshape(-1, 288)
    expected = textbook(layer.weight.flatten(1), rows)
    reconstruct(nn.Sequential(layer), lambda: iter([image.numpy() for image in images]), {"0": HALF})
    found = layer.weight.flatten(1)
    assert (found == expected).float().mean() > 0.9  # ties, which float32 decides, and all that follows
    assert (found != HALF(expected)()).float().mean() < 0.1


@GRIDS
def test_a_layer_that_reads_zeros_alone_is_rounded_to_the_nearest(network: nn.Module, grid: type[IntegerWeight | GroupedWeight]) -> None:
    nearest = grid(network[0].weight)()
    reconstruct(network, lambda: iter([np.zeros((50, 64), np.float32)]), {"0": grid})
    torch.testing.assert_close(network[0].weight.data, nearest, rtol=0, atol=0)


def test_a_scale_that_follows_from_one_weight_alone_stays() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    nn.init.uniform_(layer.weight, -0.7, 0.7)
    layer.weight.data[:, 2:4] = torch.tensor([-0.2, 1.5])
    before = IntegerWeight(layer.weight)
    assert (before.values[:, 3] == 127).all()
    x = correlated(500, 64)
    x[:, 3] *= 0.3  # so that it is rounded late, when it has much to make good
    reconstruct(nn.Sequential(layer), lambda: iter([x]), {"0": IntegerWeight})
    torch.testing.assert_close(IntegerWeight(layer.weight).scale, before.scale)


def test_layers_that_are_not_named_stay(network: nn.Module) -> None:
    before = network[0].weight.clone()
    reconstruct(network, lambda: iter([correlated(50, 64)]), {})
    torch.testing.assert_close(network[0].weight.data, before, rtol=0, atol=0)


@GRIDS
def test_bias_takes_the_mean_error(network: nn.Module, grid: type[IntegerWeight | GroupedWeight]) -> None:
    x = correlated(500, 64)
    x[:100] *= 2
    expected = network(torch.from_numpy(x)).mean(0)
    correct_biases(network, lambda: iter([x[:100], x[100:]]), {"0": grid})
    network[0].weight.data = grid(network[0].weight)()
    torch.testing.assert_close(network(torch.from_numpy(x)).mean(0), expected, rtol=1e-4, atol=1e-4)
