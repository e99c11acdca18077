"""Equalization: exact, and every channel of the outputs has one range."""

import copy
from collections.abc import Callable

import pytest
import torch
from channel_checks import IMAGES
from torch import nn

from gcvit_edge.model.deploy import Attention, Gain, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.channels import extremes, highest
from gcvit_edge.quantization.equalization import equalize, equalize_streams, outputs, streams
from gcvit_edge.quantization.smoothing import smooth
from gcvit_edge.recipe import parse_recipe, recipe_text


@pytest.fixture(scope="module")
def equalized(deployed: nn.Module) -> nn.Module:
    network = copy.deepcopy(deployed)
    equalize(network, IMAGES)
    return network


@torch.no_grad()
def test_outputs_have_one_range_by_channel(deployed: nn.Module, equalized: nn.Module) -> None:
    spread = {}
    for network in (deployed, equalized):
        ends = extremes(network, {name: layer for name, layer, _ in outputs(network)}, IMAGES)
        assert len(ends) == 2 * 7
        spread[network] = [float(highest(each).max() / highest(each).min()) for each in ends.values()]
    assert max(spread[equalized]) < 1.01 < 1.5 < min(spread[deployed])


@torch.no_grad()
def test_queries_and_keys_have_the_same_range_by_channel(equalized: nn.Module) -> None:
    pairs = {name: module for name, module in equalized.named_modules() if isinstance(module, Attention) and module.q is not None}
    assert len(pairs) == 4
    for name, attention in pairs.items():
        ends = extremes(equalized, {"q": attention.q, "k": attention.k}, IMAGES)
        ratio = highest(ends["q"]) / highest(ends["k"])
        assert ratio.max() / ratio.min() < 1.01, name


def test_gains_that_a_form_does_not_want_are_folded(equalized: nn.Module) -> None:
    smoothed = copy.deepcopy(equalized)
    smooth(smoothed, IMAGES, strengths=(1.0,))  # which scales gates

    def scaled(form: Form) -> list[str]:
        return [name for name, each in rewrite(smoothed, form).named_modules() if isinstance(each, Gain) and each.scaled]

    gates = scaled(Form(gains="none"))
    assert len(gates) > 4
    assert all("downsample.conv_block" in name or "global_query" in name for name in gates)
    assert len(scaled(Form(gains="mlp"))) == len(gates) + 7
    assert len(scaled(Form())) == len(gates) + 2 * 7


@torch.no_grad()
def test_streams_have_one_range_by_channel(deployed: nn.Module) -> None:
    network = copy.deepcopy(deployed)
    equalize_streams(network, IMAGES)
    spread = {}
    for each in (deployed, network):
        found = list(streams(each))
        assert [len(stream.points) for stream in found] == [5, 5, 5, 3]  # what enters, and two sums a block
        points = {name: point for stream in found for name, point in stream.points.items()}
        ends = extremes(each, points, IMAGES)
        magnitudes = [torch.stack([highest(ends[name]) for name in stream.points]).amax(0) for stream in found]
        spread[each] = [float(magnitude.max() / magnitude.min()) for magnitude in magnitudes]
    assert max(spread[network]) < 1.01 < 1.5 < min(spread[deployed])


@pytest.mark.parametrize(("operators", "scaled"), [(("linear", "conv"), False), (("linear", "conv", "residual"), True)])
def test_streams_are_for_additions_in_integers(make_model: Callable[..., GCViT], operators: tuple[str, ...], scaled: bool) -> None:
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq").model_copy(update={"operators": operators, "rounding": "nearest"})
    network = calibrate(make_model(), recipe, lambda: iter(IMAGES)).network
    assert all(bool((norm.gain.value != 1).any()) == scaled for stream in streams(network) for norm in stream.readers)
