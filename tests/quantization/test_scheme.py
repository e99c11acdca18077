"""Which layers are in integers, and that ranges and answers do not depend on how a form is written."""

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.evaluate import sqnr_db
from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.integers import IntegerConstant
from gcvit_edge.quantization.layers import DynamicLinear, DynamicRowLinear, RoundedPoint, StaticLayer, dynamic_linear
from gcvit_edge.quantization.ranges import Ranges, observe
from gcvit_edge.quantization.scheme import quantize

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
    assert len(kinds(quantized, StaticLayer)) == len(kinds(deployed, nn.Linear)) + 4
    assert kinds(quantized, RoundedPoint) == []
    assert len(kinds(quantized, IntegerConstant)) == 6
    assert kinds(deployed, StaticLayer) == []


def test_operators_that_are_not_asked_for_stay_float(model: nn.Module, ranges: Ranges) -> None:
    deployed = deploy(model)
    nothing = quantize(deployed, frozenset(), STATIC, ranges)
    assert kinds(nothing, nn.Linear) == kinds(deployed, nn.Linear)
    assert sqnr_db(logits(nothing), logits(model)) > 60  # position biases are stored as INT8
    points = kinds(quantize(deployed, frozenset({"attention"}), STATIC, ranges), RoundedPoint)
    assert len(points) == 6 * 4
    assert all(".attention." in name for name in points)
    points = kinds(quantize(deployed, frozenset({"residual"}), STATIC, ranges), RoundedPoint)
    assert len(points) == 6 * 2 * 3
    assert all(".residual" in name for name in points)


@pytest.mark.parametrize(
    ("arithmetic", "kind"),
    [
        (Arithmetic(activations="uint8", linear="dynamic"), DynamicLinear),
        (Arithmetic(activations="int8", linear="dynamic_row"), DynamicRowLinear),
    ],
)
def test_dynamic_linears_are_more_exact(model: nn.Module, ranges: Ranges, arithmetic: Arithmetic, kind: type) -> None:
    deployed = deploy(model)
    quantized = quantize(deployed, frozenset({"linear"}), arithmetic, ranges)
    assert len(kinds(quantized, kind)) == len(kinds(deployed, nn.Linear))
    static = quantize(deployed, frozenset({"linear"}), STATIC, ranges)
    assert sqnr_db(logits(quantized), logits(model)) > sqnr_db(logits(static), logits(model)) > 25


def test_dynamic_linear_is_what_onnx_defines() -> None:
    torch.manual_seed(0)
    x, weight, scale, bias = torch.randn(20, 7), torch.randint(-127, 128, (7, 5), dtype=torch.int8), torch.rand(5), torch.randn(5)
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    step = (high - low) / 255
    zero = round(-low / step)
    integers = np.clip(np.round(x.numpy() / step) + zero, 0, 255) - zero
    expected = integers @ weight.numpy().astype(np.float64) * step * scale.numpy() + bias.numpy()
    np.testing.assert_allclose(dynamic_linear(x, weight, scale, bias), expected, rtol=1e-4, atol=1e-3)
