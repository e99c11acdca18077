"""Layers that a recipe keeps float."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.backends import backend_names
from gcvit_edge.errors import UserError
from gcvit_edge.lower import simulate, written
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import Point, Residual, deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.keep import kept_layers, layer_names
from gcvit_edge.quantization.sensitivity import rounded_layers
from gcvit_edge.recipe import Recipe, parse_recipe

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)]


def recipe(*keep: str, operators: str = "[linear, conv]", more: str = "") -> Recipe:
    return parse_recipe(f"name: mine\ndescription: x\noperators: {operators}\nkeep_float: {list(keep)}\n{more}", "mine.yaml")


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
        ("stages.0", r"did you mean 'stages\.0\.\*'\?"),
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
            assert kinds(module) == kinds(original), layer
            if not isinstance(original, Point | Residual):
                assert isinstance(module, nn.Linear | nn.Conv2d)
                assert (module.weight == original.weight).all()
        rounded += kinds(module) != kinds(original)
    assert rounded > 50
    everything = simulate(name, calibrated, recipe("*", operators="[linear, conv, attention, residual]"))
    assert rounded_layers(before, everything) == []


def kinds(layer: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in layer.modules()]


@pytest.mark.parametrize(
    ("precision", "kept", "highest"), [("int8", "stages.0.downsample.reduction", 50), ("w4a8", "stages.0.blocks.0.fc1", 30)]
)
def test_layers_that_stay_float_keep_weights_that_rounding_would_have_fitted(precision: str, kept: str, highest: float) -> None:
    """Weights rounded by reconstruction were those of layers in float too."""
    model = create_model(dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=5, img_size=64)
    adaptive = f"precision: {precision}\nrounding: adaptive\nbackends: [onnx]\n"
    calibrated = calibrate(model, recipe(more=adaptive), lambda: iter(IMAGES))
    before, after = (each("onnx", calibrated, recipe("stages.0.*", more=adaptive)) for each in (written, simulate))
    plain = calibrate(model, recipe(more=adaptive.replace("adaptive", "nearest")), lambda: iter(IMAGES))
    image = torch.from_numpy(IMAGES[0])
    with torch.no_grad():
        torch.testing.assert_close(before(image), written("onnx", plain, recipe())(image), rtol=0, atol=0)
        everything = simulate("onnx", calibrated, recipe("*", more=adaptive))
        assert sqnr_db(everything(image).numpy(), before(image).numpy()) > 80
    fitted = "stages.1.blocks.0.fc1"
    assert torch.equal(after.get_submodule(kept).weight, before.get_submodule(kept).weight)
    assert {f"{kept}.weight", f"{fitted}.weight"} <= set(calibrated.fitted)
    assert sqnr_db(calibrated.fitted[f"{kept}.weight"].detach().numpy(), before.get_submodule(kept).weight.detach().numpy()) < highest
