"""Sensitivity of a layer is what quantizing it alone, or all but it, does to the logits."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.backends import backend_names
from gcvit_edge.cache import Measurements, digest
from gcvit_edge.lower import simulate, written
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.sensitivity import exchange, exchanged, identity, logits, rounded_layers, work
from gcvit_edge.recipe import Recipe, parse_recipe

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)]
OPERATORS = "linear, conv, attention, residual"
LAYERS = ["stages.0.downsample.reduction", "stages.1.blocks.1.attention.k", "stages.2.global_query.blocks.0.pointwise", "head"]


def recipe(*keep: str) -> Recipe:
    return parse_recipe(f"name: mine\ndescription: x\nkeep_float: {list(keep)}\n", "mine.yaml")


@pytest.fixture(scope="module")
def calibrated(make_model: Callable[..., GCViT]) -> Calibrated:
    return calibrate(make_model(), recipe(), lambda: iter(IMAGES))


@pytest.fixture(scope="module")
def networks(calibrated: Calibrated) -> tuple[nn.Module, nn.Module]:
    """Float and quantized."""
    return written("onnx", calibrated, recipe()), simulate("onnx", calibrated, recipe())


def nothing() -> None:
    pass


@pytest.mark.parametrize("backend", ["onnx", pytest.param("executorch", marks=pytest.mark.slow)])
def test_alone_and_without_are_what_quantizing_so_gives(calibrated: Calibrated, backend: str, tmp_path: Path) -> None:
    network, quantized = written(backend, calibrated, recipe()), simulate(backend, calibrated, recipe())
    names = rounded_layers(network, quantized)
    reference = logits(network, IMAGES)
    known = Measurements(tmp_path / "x.jsonl")
    alone = exchange(network, quantized, names, IMAGES, known, "alone", nothing)
    without = exchange(network, quantized, names, IMAGES, known, "without", nothing)
    for layer in LAYERS:
        expected = sqnr_db(logits(simulate(backend, calibrated, recipe(layer)), IMAGES), reference)
        assert without[layer] == pytest.approx(expected, abs=1e-3)
        single = copy.deepcopy(network)
        parent, _, child = layer.rpartition(".")
        setattr(single.get_submodule(parent), child, copy.deepcopy(quantized.get_submodule(layer)))
        assert alone[layer] == pytest.approx(sqnr_db(logits(single, IMAGES), reference), abs=1e-3)
    # both networks are as before
    assert np.array_equal(logits(network, IMAGES), reference)
    assert rounded_layers(network, quantized) == names
    # the noise of layers adds up to that of all, roughly
    total = -10 * np.log10(sum(10 ** (-db / 10) for db in alone.values()))
    assert total == pytest.approx(sqnr_db(logits(quantized, IMAGES), reference), abs=3)


def test_an_interrupted_measurement_goes_on_and_gives_the_same(networks: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    network, quantized = networks
    names = rounded_layers(*networks)
    done: list[None] = []

    def interrupt() -> None:
        done.append(None)
        if len(done) == 20:
            raise KeyboardInterrupt

    file = tmp_path / "x.jsonl"
    with pytest.raises(KeyboardInterrupt):
        exchange(network, quantized, names, IMAGES, Measurements(file), "alone", interrupt)
    known = Measurements(file)
    assert len(known.values) == 20
    resumed = exchange(network, quantized, names, IMAGES, known, "alone", nothing)
    assert resumed == exchange(network, quantized, names, IMAGES, Measurements(tmp_path / "y.jsonl"), "alone", nothing)
    assert list(resumed) == names
    # when all is known, nothing runs
    handles = [module.register_forward_pre_hook(lambda *_: pytest.fail("ran")) for module in network.modules()]
    assert exchange(network, quantized, names, IMAGES, Measurements(file), "alone", nothing) == resumed
    for handle in handles:
        handle.remove()


def test_exchange_puts_layers_back_whatever_happens(networks: tuple[nn.Module, nn.Module]) -> None:
    network, quantized = networks
    before = network.get_submodule("head")
    with exchanged(network, quantized, ["head", LAYERS[0]]):
        assert network.get_submodule("head") is quantized.get_submodule("head")
    assert network.get_submodule("head") is before
    with pytest.raises(ZeroDivisionError), exchanged(network, quantized, ["head"]):
        _ = 1 / 0
    assert network.get_submodule("head") is before


def test_work_counts_multiplications(networks: tuple[nn.Module, nn.Module]) -> None:
    network = networks[0]
    counted = work(network, LAYERS, IMAGES[0])
    assert counted["head"] == 8 * 128
    assert counted["stages.0.downsample.reduction"] == 16 * 16 * 16 * 16 * 9  # positions, channels out, in, kernel
    assert counted["stages.1.blocks.1.attention.k"] == 8 * 8 * 32 * 32


@pytest.mark.parametrize("backend", backend_names())
def test_work_of_points_is_what_they_round(calibrated: Calibrated, backend: str) -> None:
    """However often a runtime needs them to be called."""
    attention = "stages.0.blocks.0.attention"
    network = written(backend, calibrated, parse_recipe(f"name: x\ndescription: x\noperators: [{OPERATORS}]\n", "x"))
    counted = work(network, [f"{attention}.{point}" for point in ("query", "key", "value", "softmax")], IMAGES[0])
    tokens, window = 16 * 16, 2 * 2
    assert list(counted.values()) == [tokens * 16] * 3 + [tokens * window]


def test_an_addition_to_the_stream_is_one_layer(make_model: Callable[..., GCViT]) -> None:
    wanted = parse_recipe(f"name: x\ndescription: x\noperators: [{OPERATORS}]\n", "x")
    result = calibrate(make_model(), wanted, lambda: iter(IMAGES))
    names = rounded_layers(written("onnx", result, wanted), simulate("onnx", result, wanted))
    assert "stages.0.blocks.0.residual1" in names
    assert not [name for name in names if ".residual1." in name or ".residual2." in name]


def test_what_is_measured_is_of_the_network_and_what_was_fitted() -> None:
    torch.manual_seed(0)
    network, fitted = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), {"0.weight": torch.randn(3, 3)}
    moved, other = copy.deepcopy(network), nn.Sequential(network[0], nn.GELU())
    moved[0].bias.data[1] += 1e-6
    versions = [(network, fitted), (network, {}), (network, {"0.weight": fitted["0.weight"] + 1}), (moved, fitted), (other, fitted)]
    assert len({digest(identity(*version)) for version in versions}) == len(versions)
    assert digest(identity(copy.deepcopy(network), dict(fitted))) == digest(identity(network, fitted))
