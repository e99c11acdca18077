"""Every algorithm has its switch in the recipe, and does what it is there for."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gcvit_edge.errors import CheckFailed
from gcvit_edge.model.deploy import deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import Rounding
from gcvit_edge.recipe import Recipe

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)]
OFF: dict[str, Any] = {"centering": False, "smoothing": False, "equalization": False}


def calibrated(model: GCViT, **keys: Any) -> Calibrated:
    return calibrate(model, Recipe.model_validate({"name": "x", "description": "x"} | OFF | keys), lambda: iter(IMAGES))


def changed(model: GCViT, **keys: Any) -> set[str]:
    """Kinds of tensors of the deploy form that a recipe with these keys changes."""
    result = calibrated(model, **keys)
    before, after = deploy(model).state_dict(), {**result.network.state_dict(), **result.fitted}
    return {".".join(name.split(".")[-2:]) for name, value in after.items() if not torch.equal(value, before[name])}


def test_nothing_is_changed_with_everything_off(tiny_model: GCViT) -> None:
    assert changed(tiny_model) == set()


@pytest.mark.parametrize(
    ("key", "some", "others"),
    [
        ("centering", {"k.bias", "v.bias", "proj.bias"}, {"k.weight", "gain.value"}),
        ("smoothing", {"norm1.weight", "fc1.weight", "proj.weight"}, {"fc2.weight", "q.bias"}),
        ("equalization", {"q.weight", "k.weight", "fc2.weight", "gain.value"}, {"v.weight", "norm1.weight", "fc1.weight"}),
        ("bias_correction", {"k.bias", "fc1.bias", "fc2.bias"}, {"fc1.weight"}),
    ],
)
def test_switch(tiny_model: GCViT, key: str, some: set[str], others: set[str]) -> None:
    found = changed(tiny_model, **{key: True})
    assert some <= found
    assert not others & found


def test_a_fixed_range_of_the_softmax(tiny_model: GCViT) -> None:
    operators = ["linear", "conv", "attention"]
    seen, fixed = (calibrated(tiny_model, operators=operators, calibration={"unit_softmax": unit}).ranges for unit in (False, True))
    places = {place for place in seen if place.endswith("softmax")}
    assert len(places) == 8
    assert {fixed[place] for place in places} == {(0.0, 1.0)}
    assert all(seen[place][0] >= 0 and seen[place][1] < 1 for place in places)
    assert {place: ends for place, ends in fixed.items() if place not in places} == {
        place: ends for place, ends in seen.items() if place not in places
    }


def test_what_is_fitted_to_rounding_is_for_the_layers_that_are_rounded(tiny_model: GCViT) -> None:
    plain = calibrated(tiny_model).network.state_dict()
    fitted = calibrated(tiny_model, bias_correction=True)
    for name, value in fitted.network.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    some, everything = fitted.to_round(["head"]).state_dict(), fitted.to_round().state_dict()
    different = {name for name, value in some.items() if not torch.equal(value, everything[name])}
    assert different == {"head.bias"}
    torch.testing.assert_close(some["head.bias"], plain["head.bias"], rtol=0, atol=0)


def test_ranges_are_those_of_the_network_that_is_rounded(tiny_model: GCViT) -> None:
    """With what was fitted, by the method that the recipe names."""
    result = calibrated(tiny_model, bias_correction=True, calibration={"ranges": "average"})
    assert result.ranges == observe(result.to_round(), lambda: iter(IMAGES), "average")
    assert result.ranges != observe(result.network, lambda: iter(IMAGES), "average")


@pytest.mark.parametrize(("precision", "fc1"), [("int8", True), ("w4a8", False)])
def test_ranges_are_of_the_places_that_a_runtime_rounds_in_this_precision(tiny_model: GCViT, precision: str, fc1: bool) -> None:
    recipe = Recipe.model_validate({"name": "x", "description": "x", "precision": precision, "backends": ["onnx"]} | OFF)
    runtime = Rounding(frozenset({"linear", "conv"}), Arithmetic(activations="uint8", linear="weights"))
    ranges = calibrate(tiny_model, recipe, lambda: iter(IMAGES), [runtime]).ranges
    assert "stages.0.downsample.reduction.input" in ranges
    assert ("stages.3.blocks.0.fc1.input" in ranges) == fc1
    assert "stages.0.blocks.0.attention.q.input" not in ranges


def test_activations_that_overflow(tiny_model: GCViT) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.head.fc.weight.fill_(3e38)  # type: ignore[union-attr]
    with pytest.raises(CheckFailed, match="the float model gives logits that are not finite"):
        calibrated(model)


@pytest.mark.parametrize(
    "keys", [{"smoothing": True}, {"rounding": "adaptive"}, {"bias_correction": True}, {"calibration": {"ranges": "mse"}}, {}]
)
def test_activations_that_overflow_in_one_of_many_images(tiny_model: GCViT, keys: dict[str, Any]) -> None:
    """Not among the first, which are looked at before anything else."""
    images = [*IMAGES, *IMAGES, np.full_like(IMAGES[0], np.inf), *IMAGES]
    recipe = Recipe.model_validate({"name": "x", "description": "x"} | OFF | keys)
    with pytest.raises(CheckFailed, match="the float model gives logits that are not finite"):
        calibrate(tiny_model, recipe, lambda: iter(images))
