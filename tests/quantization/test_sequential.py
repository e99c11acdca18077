"""Rounding of weights layer after layer."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import deploy
from gcvit_edge.model.deploy.parts import parts
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.integers import GroupedWeight
from gcvit_edge.quantization.rounding import Grids, dense_layers, reconstruct
from gcvit_edge.quantization.scheme import weight_grids
from gcvit_edge.quantization.sequential import _turns, reconstruct_in_turn
from gcvit_edge.recipe import parse_recipe


def images(seed: int, count: int = 24) -> list[np.ndarray]:
    """(1, 3, 64, 64) each, in squares of one colour."""
    squares = np.random.default_rng(seed).standard_normal((count, 1, 3, 8, 8), np.float32)
    return [np.ascontiguousarray(each.repeat(8, 2).repeat(8, 3)) for each in squares]


@pytest.fixture(scope="module")
def network(make_model: Callable[..., GCViT]) -> nn.Module:
    return deploy(make_model(dim=32))


@pytest.fixture(scope="module")
def grids(network: nn.Module) -> Grids:
    return weight_grids(network, ("linear", "conv"), "int4")


@pytest.fixture(scope="module")
def rounded(network: nn.Module, grids: Grids) -> nn.Module:
    result = copy.deepcopy(network)
    reconstruct_in_turn(result, lambda: iter(images(0)), grids)
    return result


@torch.no_grad()
def noise_db(network: nn.Module, rounded: nn.Module, seed: int) -> float:
    x = torch.from_numpy(np.concatenate(images(seed)))
    return sqnr_db(rounded(x).numpy(), network(x).numpy())


def test_it_beats_layers_that_make_good_their_own_errors_alone_on_other_images_too(
    network: nn.Module, grids: Grids, rounded: nn.Module
) -> None:
    alone = copy.deepcopy(network)
    reconstruct(alone, lambda: iter(images(0)), grids)
    assert noise_db(network, rounded, 0) > noise_db(network, alone, 0) + 2
    assert noise_db(network, rounded, 1) > noise_db(network, alone, 1) + 0.5


def test_weights_are_on_their_grids_and_all_else_stays(network: nn.Module, grids: Grids, rounded: nn.Module) -> None:
    dense, four_bits = dense_layers(network, grids), 0
    for name, before in network.named_parameters():
        after, layer = rounded.get_parameter(name), name.removesuffix(".weight")
        if layer in dense and name.endswith(".weight"):
            grid = grids[layer](after.data)
            torch.testing.assert_close(grid(), after.data, rtol=1e-6, atol=0)
            four_bits += isinstance(grid, GroupedWeight)
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert four_bits > 30


def test_it_does_not_learn_the_images_by_heart(network: nn.Module, rounded: nn.Module) -> None:
    head = network.get_submodule("head").weight
    assert len(head[0]) > 4 * len(images(0))  # fewer rows than weights: without the ridge, 68 dB on these images and 31 on others
    assert noise_db(network, rounded, 0) < noise_db(network, rounded, 1) + 15


def test_layers_run_in_turn_and_those_of_one_input_together(network: nn.Module) -> None:
    found, state = {}, (torch.from_numpy(images(0)[0]),)
    everything = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for part in parts(network):
        inside = {name: layer for name, layer in everything.items() if part.layers and name.startswith(part.layers)}
        with torch.no_grad():
            found[part.name] = _turns(part, inside, state)  # type: ignore[arg-type]
            state = part.run(state)
    block = "stages.1.blocks.0"
    qkv = [f"{block}.attention.{name}" for name in "qkv"]
    assert found[block] == [qkv, [f"{block}.attention.proj"], [f"{block}.fc1"], [f"{block}.fc2"]]
    assert found["stages.1.blocks.1"][0] == [f"stages.1.blocks.1.attention.{name}" for name in "kv"]
    assert found["head"] == [["head"]]
    assert sorted(name for turns in found.values() for turn in turns for name in turn) == sorted(everything)


def test_layers_that_stay_float_have_no_error_to_make_good(make_model: Callable[..., GCViT]) -> None:
    text = "name: x\ndescription: x\nprecision: int4\nrounding: sequential\nbackends: [onnx]\nsmoothing: false\nkeep_float: [{}]\n"
    model = make_model(dim=32)

    def fitted(keep: str) -> set[str]:
        calibrated = calibrate(model, parse_recipe(text.format(keep), "x.yaml"), lambda: iter(images(0, 4)))
        return {name.removesuffix(".weight") for name in calibrated.fitted}

    everything = set(dense_layers(deploy(model), weight_grids(deploy(model), ("linear", "conv"), "int4")))
    assert fitted("'stages.[0-2].*'") == {name for name in everything if not name.startswith(("stages.0", "stages.1", "stages.2"))}
    assert fitted("'stages.*'") == {"head"}
