"""Layers that a recipe keeps float."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from torch import nn

from gcvit_edge.backends import backend_names
from gcvit_edge.errors import UserError
from gcvit_edge.lower import simulate, written
from gcvit_edge.model.deploy import Point, deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.keep import kept_layers, layer_names
from gcvit_edge.recipe import Recipe, parse_recipe

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)]


def recipe(*keep: str, operators: str = "[linear, conv]") -> Recipe:
    return parse_recipe(f"name: mine\ndescription: x\noperators: {operators}\nkeep_float: {list(keep)}\n", "mine.yaml")


@pytest.fixture(scope="module")
def calibrated(make_model: Callable[..., GCViT]) -> Calibrated:
    return calibrate(make_model(), recipe(), lambda: iter(IMAGES))


def test_names_and_patterns(make_model: Callable[..., GCViT]) -> None:
    network = deploy(make_model())
    assert kept_layers(network, ["head"]) == {"head"}
    assert kept_layers(network, []) == frozenset()
    first = kept_layers(network, ["stages.0.*"])
    assert first == {name for name in layer_names(network) if name.startswith("stages.0.")}
    assert len(kept_layers(network, ["*.fc2"])) == 8
    assert kept_layers(network, ["*.fc2", "head"]) == kept_layers(network, ["*.fc2"]) | {"head"}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("stages.0.blocks.0.atention.q", r"did you mean 'stages\.0\.blocks\.0\.attention\.q'\?"),
        ("stages.7.*", r"did you mean 'stages\.\d\.\*'\?"),
        ("haed", r"did you mean 'head'\?"),
        ("", r"such as "),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_the_nearest(make_model: Callable[..., GCViT], pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"keep_float: {re.escape(repr(pattern))} matches no layer of the network; {hint}"):
        kept_layers(deploy(make_model()), ["head", pattern])


@pytest.mark.parametrize("name", backend_names())
def test_every_backend_keeps_them(calibrated: Calibrated, name: str) -> None:
    wanted = recipe("stages.0.*", "*.fc1", "head", operators="[linear, conv, attention, residual]")
    kept = kept_layers(calibrated.network, wanted.keep_float)
    before, after = written(name, calibrated, wanted), simulate(name, calibrated, wanted)
    rounded = 0
    for layer in layer_names(calibrated.network):
        module, original = after.get_submodule(layer), before.get_submodule(layer)
        if layer in kept:
            assert type(module) is type(original), layer
            if not isinstance(original, Point):
                assert isinstance(module, nn.Linear | nn.Conv2d)
                assert (module.weight == original.weight).all()
        rounded += type(module) is not type(original)
    assert rounded > 50
    everything = simulate(name, calibrated, recipe("*", operators="[linear, conv, attention, residual]"))
    assert all(type(everything.get_submodule(layer)) is type(before.get_submodule(layer)) for layer in layer_names(before))
