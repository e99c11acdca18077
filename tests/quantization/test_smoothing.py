"""Smoothing: exact, and worth it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.evaluate import sqnr_db
from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import Attention, Gain, deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import quantize
from gcvit_edge.quantization.smoothing import STRENGTHS, outputs, places, smooth

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((12, 3, 64, 64), np.float32)]
STATIC = Arithmetic(activations="int8", delicate="static", linear_output=True, conv_output=True)


@pytest.fixture(scope="module")
def deployed() -> nn.Module:
    """With outlier channels, as trained networks have them, behind norms, gates and reductions."""
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::7] *= 12
            elif name.endswith(("qkv.weight", "fc1.weight")):
                parameter[:, ::7] /= 12
            elif name.endswith(("conv_pw.weight", "fc2.weight", "reduction.weight")) and parameter.ndim >= 2:
                parameter[::5] *= 3
    return deploy(model)


def logits(network: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(image)).numpy() for image in IMAGES])


@pytest.fixture(scope="module")
def smoothed(deployed: nn.Module) -> nn.Module:
    network = copy.deepcopy(deployed)
    chosen = smooth(network, IMAGES)
    assert set(chosen) == {place.name for place in places(network)}
    assert set(chosen.values()) <= set(STRENGTHS)
    assert len(set(chosen.values())) > 1
    return network


@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(gains=frozenset()),
        Form(norm="products", attention="bmm", pointwise="conv"),
        Form(attention="operator", gains=frozenset({"conv"})),
    ],
    ids=["reference", "openvino", "executorch", "onnx"],
)
def test_logits_stay_in_every_form(deployed: nn.Module, smoothed: nn.Module, form: Form) -> None:
    assert sqnr_db(logits(rewrite(smoothed, form)), logits(deployed)) > 100


def test_int8_is_more_exact(deployed: nn.Module, smoothed: nn.Module) -> None:
    noise = []
    for network in (deployed, smoothed):
        ranges = observe(network, lambda: iter(IMAGES))
        noise.append(sqnr_db(logits(quantize(network, frozenset({"linear", "conv"}), STATIC, ranges)), logits(deployed)))
    assert noise[1] > noise[0] + 1


def test_nothing_is_scaled_at_strength_0(deployed: nn.Module) -> None:
    network = copy.deepcopy(deployed)
    smooth(network, IMAGES, strengths=(0.0,))
    for place, before in zip(places(network), places(deployed), strict=True):
        if place.name.endswith(("norm1", "norm2", "norm")):
            norm, old = network.get_submodule(place.name), deployed.get_submodule(place.name)
            torch.testing.assert_close(norm.weight, old.weight)
        assert place.name == before.name


def test_outputs_have_one_range_by_channel(smoothed: nn.Module) -> None:
    highest: dict[str, torch.Tensor] = {}

    def see(name: str, y: torch.Tensor) -> None:
        seen = (y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]) if y.ndim == 4 else y).abs().amax(0)
        highest[name] = torch.maximum(highest.get(name, seen), seen)

    handles = [layer.register_forward_hook(lambda m, x, y, name=name: see(name, y)) for name, layer, _ in outputs(smoothed)]
    logits(smoothed)
    for handle in handles:
        handle.remove()
    assert len(highest) == 4 + 2 * 7
    for name, seen in highest.items():
        assert seen.max() / seen.min() < 1.01, name


def test_keys_and_values_are_centred(smoothed: nn.Module) -> None:
    ends: list[float] = []

    def see(m: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
        ends.append(float((y.amax(0) + y.amin(0)).abs().max() / y.abs().max()))

    layers = [layer for module in smoothed.modules() if isinstance(module, Attention) for layer in (module.k, module.v)]
    handles = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        smoothed(torch.from_numpy(np.concatenate(IMAGES)))  # all that set the middle, at once
    for handle in handles:
        handle.remove()
    assert len(ends) == 2 * 7
    assert max(ends) < 1e-3


def test_gains_that_a_form_does_not_want_are_folded(smoothed: nn.Module) -> None:
    def scaled(form: Form) -> list[str]:
        return [name for name, each in rewrite(smoothed, form).named_modules() if isinstance(each, Gain) and each.scaled]

    gates = scaled(Form(gains=frozenset()))
    assert all("downsample.conv_block" in name or "global_query" in name for name in gates)
    assert len(scaled(Form(gains=frozenset({"conv"})))) == len(gates) + 4
    assert len(scaled(Form())) == len(gates) + 4 + 2 * 7
