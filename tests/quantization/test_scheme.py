"""Which layers are in integers, and that ranges and answers do not depend on how a form is written."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gcvit_edge.lower import simulate, written
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import MBConv, deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.integers import Affine, GroupedWeight, HalfWeight, IntegerConstant, IntegerWeight
from gcvit_edge.quantization.keep import layer_names
from gcvit_edge.quantization.layers import (
    DynamicConv,
    DynamicConv2d,
    DynamicLinear,
    DynamicRowLinear,
    GroupedLinear,
    RoundedPoint,
    StaticConvLinear,
    StaticLayer,
    WeightLayer,
    dynamic_linear,
    grouped_linear,
)
from gcvit_edge.quantization.ranges import Ranges, observe
from gcvit_edge.quantization.scheme import Rounding, places_with_ranges, quantize, roundable_layers
from gcvit_edge.recipe import Recipe

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((8, 3, 64, 64), np.float32)]
STATIC = Arithmetic(activations="uint8")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)


@pytest.fixture(scope="module")
def ranges(model: nn.Module) -> Ranges:
    return observe(deploy(model), lambda: iter(IMAGES))


def logits(network: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(image)).numpy() for image in IMAGES])


def kinds(network: nn.Module, kind: type) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("form", [Form(norm="products", attention="bmm", pointwise="conv"), Form(norm="products")])
def test_ranges_are_the_same_in_every_form(model: nn.Module, ranges: Ranges, form: Form) -> None:
    other = observe(rewrite(deploy(model), form), lambda: iter(IMAGES))
    assert other.keys() == ranges.keys()
    for place, (low, high) in ranges.items():
        assert other[place] == pytest.approx((low, high), rel=1e-3, abs=1e-4), place


def test_ranges_are_extremes_over_all_images(model: nn.Module, ranges: Ranges) -> None:
    single = [observe(deploy(model), lambda image=image: iter([image])) for image in IMAGES]
    for place, (low, high) in ranges.items():
        assert low == min(each[place][0] for each in single)
        assert high == max(each[place][1] for each in single)


def test_observing_leaves_no_hooks(model: nn.Module) -> None:
    deployed = deploy(model)
    observe(deployed, lambda: iter(IMAGES[:1]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in deployed.modules())


def test_linears_and_dense_convolutions_are_integer_and_no_others(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    quantized = quantize(deployed, frozenset({"linear", "conv"}), STATIC, ranges)
    assert kinds(quantized, nn.Linear) == []
    assert kinds(quantized, nn.Conv2d) == ["conv1", *(name for name in kinds(deployed, nn.Conv2d) if name.endswith("depthwise"))]
    delicate = [name for name in kinds(deployed, nn.Linear) if name.endswith(("head", "squeeze", "excite"))]
    assert len(delicate) == 1 + 2 * len(kinds(deployed, MBConv)) > 10
    assert kinds(quantized, WeightLayer) == delicate
    assert len(kinds(quantized, StaticLayer)) == len(kinds(deployed, nn.Linear)) - len(delicate) + 4
    assert kinds(quantized, RoundedPoint) == []
    assert len(kinds(quantized, IntegerConstant)) == 6
    assert kinds(deployed, StaticLayer) == []


def test_late_pointwise_convolutions_have_scales_of_their_own_where_a_runtime_wants_them(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    linears = kinds(deployed, nn.Linear)
    late = [name for name in linears if name.startswith(("stages.2.", "stages.3.")) and name.endswith("pointwise")]
    assert len(late) == 4
    others = {*linears, *kinds(deployed, nn.Conv2d)} - set(late)
    together, apart = (
        quantize(deployed, frozenset({"conv"}), dataclasses.replace(STATIC, late_pointwise=scales), ranges, keep=others)
        for scales in (None, "weights")
    )
    assert (kinds(together, StaticLayer), kinds(apart, WeightLayer)) == (late, late)
    assert sqnr_db(logits(apart), logits(model)) > sqnr_db(logits(together), logits(model))


def test_mlps_of_the_last_stage_have_scales_of_their_own_where_a_runtime_wants_them(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    linears = kinds(deployed, nn.Linear)
    mlps = [name for name in linears if name.endswith(("fc1", "fc2"))]
    last = [name for name in mlps if name.startswith("stages.3.")]
    assert 0 < len(last) < len(mlps)
    others = {*linears, *kinds(deployed, nn.Conv2d)} - set(mlps)
    together, apart = (
        quantize(deployed, frozenset({"linear"}), dataclasses.replace(STATIC, linear_output=True, last_mlp=scales), ranges, keep=others)
        for scales in (None, "dynamic_row")
    )
    assert (kinds(together, StaticLayer), kinds(together, DynamicRowLinear)) == (mlps, [])
    assert (kinds(apart, StaticLayer), kinds(apart, DynamicRowLinear)) == ([name for name in mlps if name not in last], last)
    assert sqnr_db(logits(apart), logits(model)) > sqnr_db(logits(together), logits(model))


def test_operators_that_are_not_asked_for_stay_float(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    nothing = quantize(deployed, frozenset(), STATIC, ranges)
    assert kinds(nothing, nn.Linear) == kinds(deployed, nn.Linear)
    assert sqnr_db(logits(nothing), logits(model)) > 60  # position biases are stored as INT8
    points = kinds(quantize(deployed, frozenset({"attention"}), STATIC, ranges), RoundedPoint)
    assert len(points) == 6 * 4
    assert all(".attention." in name for name in points)
    answers = dataclasses.replace(STATIC, linear_output=True)
    assert len(kinds(quantize(deployed, frozenset({"attention"}), answers, ranges), RoundedPoint)) == 6 * 6
    points = kinds(quantize(deployed, frozenset({"residual"}), STATIC, ranges), RoundedPoint)
    assert len(points) == 6 * 2 * 3
    assert all(".residual" in name for name in points)


@pytest.mark.parametrize(
    ("arithmetic", "kind"),
    [
        (Arithmetic(activations="uint8", linear="dynamic", mlp="dynamic", delicate="dynamic"), DynamicLinear),
        (Arithmetic(activations="int8", linear="dynamic_row", mlp="dynamic_row", delicate="dynamic_row"), DynamicRowLinear),
    ],
)
def test_dynamic_linears_are_more_exact(model: nn.Module, ranges: Ranges, arithmetic: Arithmetic, kind: type) -> None:
    deployed = deploy(model)
    operators, others = frozenset({"linear", "conv"}), kinds(deployed, nn.Conv2d)
    quantized = quantize(deployed, operators, arithmetic, ranges, keep=others)
    assert len(kinds(quantized, kind)) == len(kinds(deployed, nn.Linear))
    static = quantize(deployed, operators, dataclasses.replace(STATIC, delicate="static"), ranges, keep=others)
    weights_alone = Arithmetic(activations="uint8", linear="weights", mlp="weights")
    exact = logits(quantize(deployed, operators, weights_alone, ranges, keep=others))  # weights are rounded in all of them alike
    assert sqnr_db(logits(quantized), exact) > sqnr_db(logits(static), exact) > 25


def test_dynamic_linear_is_what_onnx_defines() -> None:
    torch.manual_seed(0)
    x, weight, scale, bias = torch.randn(20, 7), torch.randint(-127, 128, (7, 5), dtype=torch.int8), torch.rand(5), torch.randn(5)
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    step = (high - low) / 255
    zero = round(-low / step)
    integers = np.clip(np.round(x.numpy() / step) + zero, 0, 255) - zero
    expected = integers @ weight.numpy().astype(np.float64) * step * scale.numpy() + bias.numpy()
    np.testing.assert_allclose(dynamic_linear(x, weight, scale, bias), expected, rtol=1e-4, atol=1e-3)


def test_dynamic_conv_is_dynamic_linear_of_the_pixels_that_each_output_reads(model: nn.Module, ranges: Ranges) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 5, 3, stride=2, padding=1), torch.randn(2, 4, 9, 6)
    layer = DynamicConv(conv)
    pixels = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 4, 9).mT.reshape(-1, 36)
    expected = dynamic_linear(pixels, layer.weight, layer.scale, layer.bias).reshape(2, 5, 3, 5).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert sqnr_db(layer(x).numpy(), conv(x).numpy()) > 35
    quantized = quantize(deploy(model), frozenset({"conv"}), Arithmetic(activations="uint8", conv="dynamic"), ranges)
    assert len(kinds(quantized, DynamicConv)) == 4


def test_dynamic_convolutions_round_image_by_image(model: nn.Module, ranges: Ranges) -> None:
    arithmetic = Arithmetic(activations="int8", conv="dynamic_image")
    quantized = quantize(deploy(model), frozenset({"conv"}), arithmetic, ranges)
    assert len(kinds(quantized, DynamicConv2d)) == 4
    batch = torch.from_numpy(np.concatenate(IMAGES[:3])) * torch.tensor([1.0, 20.0, 0.1]).view(3, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(quantized(batch), torch.cat([quantized(image[None]) for image in batch]), rtol=1e-4, atol=1e-4)


def test_the_convolution_of_the_image_stays_float_whatever_its_channels(make_model: Callable[..., GCViT]) -> None:
    deployed = deploy(make_model(in_chans=6))
    quantized = quantize(deployed, frozenset({"conv"}), Arithmetic(activations="int8", linear="dynamic", conv="dynamic"), {})
    assert "conv1" in kinds(quantized, nn.Conv2d)


@pytest.mark.parametrize(
    ("precision", "grouped", "kind"),
    [
        ("w4a8", "dynamic_row", DynamicRowLinear), ("w4a8", "dynamic_block", GroupedLinear),
        ("int4", "weights", WeightLayer), ("int4", "dynamic_block", GroupedLinear),
    ],
)  # fmt: skip
def test_four_bits(model: nn.Module, ranges: Ranges, precision: str, grouped: str, kind: type) -> None:
    deployed = deploy(model)
    quantized = quantize(deployed, frozenset({"linear", "conv"}), Arithmetic(activations="int8", grouped=grouped), ranges, precision)
    exact = ("head", "squeeze", "excite", "pointwise")  # the last is a convolution in some forms, and those are INT8
    small = {n for n in kinds(deployed, nn.Linear) if not n.endswith(exact) and n in wide(deployed)}
    in_eight = {name.rpartition(".")[0] for name in kinds(quantized, IntegerWeight)}
    assert set(kinds(quantized, kind)) - in_eight == small
    assert all(layer.rounded == (precision == "w4a8") for layer in quantized.modules() if isinstance(layer, GroupedLinear))
    assert 10 < sqnr_db(logits(quantized), logits(model)) < 50


def wide(network: nn.Module) -> set[str]:
    """Linears whose inputs make whole groups."""
    return {name for name, each in network.named_modules() if isinstance(each, nn.Linear) and each.in_features % GroupedWeight.GROUP == 0}


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 55), ("bf16", 38)])
def test_half_precision_has_all_weights(model: nn.Module, ranges: Ranges, precision: Any, limit: float) -> None:
    deployed = deploy(model)
    quantized = quantize(deployed, frozenset({"linear", "conv"}), STATIC, ranges, precision)
    assert kinds(quantized, nn.Linear) == kinds(quantized, nn.Conv2d) == []
    assert len(kinds(quantized, HalfWeight)) == len(kinds(deployed, nn.Linear)) + len(kinds(deployed, nn.Conv2d)) + 6
    assert sqnr_db(logits(quantized), logits(model)) > limit


def test_grouped_linear_is_a_product_with_its_integers() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 64), GroupedWeight(torch.randn(5, 64))
    exact = x @ weight().T
    torch.testing.assert_close(grouped_linear(x, weight.values, weight.scale, False), exact, rtol=1e-5, atol=1e-4)
    rounded = grouped_linear(x, weight.values, weight.scale, True)
    assert 30 < sqnr_db(rounded.numpy(), exact.numpy()) < 60


@pytest.mark.parametrize("rounded", [False, True])
@torch.no_grad()
def test_grouped_linear_rounds_32_channels_of_a_row_together(rounded: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 5), torch.randn(9, 64) * torch.logspace(-2, 2, 9)[:, None]
    x[:, 32:] *= 30
    read = x.double().reshape(9, 2, 32)
    if rounded:
        steps = read.abs().amax(2, keepdim=True) / 127
        read = torch.round(read / steps) * steps
    expected = read.reshape(9, 64) @ GroupedWeight(layer.weight)().double().T + layer.bias
    torch.testing.assert_close(GroupedLinear(layer, rounded)(x), expected.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_linear_written_as_a_convolution_is_the_linear() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5), torch.randn(12, 7)
    ends = Affine.of_range(-2, 3, "uint8"), Affine.of_range(-1, 1, "uint8")
    torch.testing.assert_close(StaticConvLinear(layer, *ends)(x), StaticLayer(layer, *ends)(x), rtol=0, atol=1.001 * ends[1].scale)
    exact = StaticConvLinear(layer, ends[0], None), StaticLayer(layer, ends[0], None)
    torch.testing.assert_close(exact[0](x), exact[1](x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_are_rounded_with_the_ranges_of_their_own_places(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    arithmetic = dataclasses.replace(STATIC, linear_output=True, symmetric_right=True, static_linear="conv")
    quantized = quantize(deployed, frozenset({"linear", "conv"}), arithmetic, ranges)
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, StaticLayer)}
    assert len(layers) > 40
    for name, layer in layers.items():
        is_linear = isinstance(deployed.get_submodule(name), nn.Linear)
        assert isinstance(layer, StaticConvLinear) == is_linear
        assert layer.input == Affine.of_range(*ranges[f"{name}.input"], "uint8")
        # keys and values too, since products are in float
        assert layer.output == (Affine.of_range(*ranges[f"{name}.output"], "uint8") if is_linear else None)
        read = torch.randn(3, layer.weight.values.shape[1], 4, 4) if not is_linear else torch.randn(3, layer.weight.values.shape[1])
        answer = layer(read)
        if layer.output is not None:
            torch.testing.assert_close(answer, layer.output.round_trip(answer), rtol=0, atol=0)


def test_weights_alone_need_no_ranges(model: nn.Module) -> None:
    runtime = Rounding(frozenset({"linear", "conv"}), dataclasses.replace(STATIC, delicate="static"))
    assert places_with_ranges(deploy(model), [runtime], "int4") == frozenset()
    assert places_with_ranges(deploy(model), [runtime], "fp16") == frozenset()
    assert len(places_with_ranges(deploy(model), [runtime], "w4a8")) > 10


def test_right_factors_are_symmetric_where_the_runtime_wants_it(model: nn.Module, ranges: Ranges) -> None:
    arithmetic = Arithmetic(activations="int8", linear_output=True, symmetric_right=True)
    quantized = quantize(deploy(model), frozenset({"linear", "attention"}), arithmetic, ranges)
    affines: dict[str, Affine] = {name: each.affine for name, each in quantized.named_modules() if isinstance(each, RoundedPoint)}
    right = [name for name in affines if name.endswith((".key", ".value"))]
    assert len(right) == 12
    assert all(affines[name].zero_point == 0 for name in right)
    for name, layer in quantized.named_modules():  # integers move from a layer to a product as they are
        if name.endswith("attention.k"):
            assert layer.output == affines[name.removesuffix("k") + "key"]
        elif name.endswith("attention.v"):
            assert layer.output == affines[name.removesuffix("v") + "value"]
        elif name.endswith("attention.proj"):
            assert layer.input == affines[name.removesuffix("proj") + "attended"]


def test_only_what_is_rounded_with_fixed_scales_needs_a_range(model: nn.Module, ranges: Ranges) -> None:
    deployed, operators = deploy(model), frozenset({"linear", "conv"})
    dynamic = Arithmetic(activations="uint8", linear="dynamic", mlp="dynamic", conv="dynamic")
    assert places_with_ranges(deployed, [Rounding(operators, dynamic)]) == frozenset()
    mlp = dataclasses.replace(dynamic, mlp="static", linear_output=True)
    fixed = {f"{name}.{end}" for name in kinds(deployed, nn.Linear) if name.endswith(("fc1", "fc2")) for end in ("input", "output")}
    assert places_with_ranges(deployed, [Rounding(operators, dynamic), Rounding(operators, mlp)]) == fixed
    assert len(fixed) == 6 * 2 * 2
    assert observe(deployed, lambda: iter(IMAGES), places=fixed) == {place: ends for place, ends in ranges.items() if place in fixed}
    for method in ("minmax", "mse"):
        everything = observe(deployed, lambda: iter(IMAGES), method)
        assert observe(deployed, lambda: iter(IMAGES), method, fixed) == {place: everything[place] for place in fixed}
    assert observe(deployed, lambda: iter(IMAGES), places=[]) == {}


@pytest.mark.parametrize("backend", ["executorch", "openvino", "onnx"])
@pytest.mark.parametrize("operator", ["linear", "conv"])
def test_one_by_one_convolutions_are_convolutions_in_every_form(operator: Any, backend: str, model: GCViT) -> None:
    recipe = Recipe(name="one", description="of them", operators=(operator,), rounding="adaptive")
    calibrated = calibrate(model, recipe, lambda: iter(IMAGES))
    quantized, plain = simulate(backend, calibrated, recipe), written(backend, calibrated, recipe)
    changed = {name for name, module in plain.named_modules() if type(module) is not type(quantized.get_submodule(name))}
    pointwise = {name for name, _ in plain.named_modules() if name.endswith("pointwise")}
    assert pointwise
    assert pointwise <= changed if operator == "conv" else not pointwise & changed
    for name, module in plain.named_modules():
        if name not in changed and isinstance(module, nn.Linear | nn.Conv2d):  # what stays float keeps its weights
            torch.testing.assert_close(quantized.get_submodule(name).weight, module.weight, rtol=0, atol=0)


def test_what_may_be_rounded_has_the_names_of_what_may_stay_float(model: nn.Module) -> None:
    deployed = deploy(model)
    found = {each: roundable_layers(deployed, {each}, "int8") for each in ("linear", "conv", "attention", "residual")}
    assert frozenset.union(*found.values()) <= set(layer_names(deployed))
    assert sum(map(len, found.values())) == len(frozenset.union(*found.values()))
    assert {"stages.0.blocks.1.attention.softmax", "stages.0.blocks.1.attention.key"} <= found["attention"]
    blocks = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate((2, 2, 1, 1)) for block in range(depth)]
    assert found["residual"] == {f"{block}.residual{which}" for block in blocks for which in (1, 2)}
