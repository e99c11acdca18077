"""Learned weights and ranges: the simulation rounds as what is exported does, and every artifact gets what was learned."""

import dataclasses
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import Tensor, nn

from gcvit_edge.backends import backend_names, load_backend
from gcvit_edge.lower import lower_quantized, rounding
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization import sensitivity
from gcvit_edge.quantization.arithmetic import Arithmetic, Signedness
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.integers import Affine, IntegerConstant, IntegerWeight
from gcvit_edge.quantization.layers import RoundedPoint, StaticLayer
from gcvit_edge.quantization.learned import LearnedLayer, LearnedPoint, Range, learnable, learned
from gcvit_edge.quantization.scheme import Rounding, quantize
from gcvit_edge.recipe import Operator, parse_recipe, recipe_text

RECIPE = parse_recipe(recipe_text("int8_qat"), "int8_qat")
OPERATORS: frozenset[Operator] = frozenset({"linear", "conv"})
RUNTIMES = [rounding(RECIPE, load_backend(name)) for name in backend_names()]
STRICTEST = [Rounding(OPERATORS, Arithmetic(activations="int8", linear_output=True))]
IMAGES = np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)


@pytest.fixture(scope="module")
def model() -> GCViT:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)


@pytest.fixture(scope="module")
def calibrated(model: GCViT) -> Calibrated:
    return calibrate(model, RECIPE, lambda: iter(np.split(IMAGES, len(IMAGES))))


@pytest.fixture(scope="module")
def student(calibrated: Calibrated) -> nn.Module:
    """As if trained: other weights, and ranges of half to three quarters of their size, so that much is clipped."""
    network = learnable(calibrated, RUNTIMES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Range):
                module.logarithms.copy_(-0.3 - 0.4 * torch.rand(2, generator=generator))
            elif isinstance(module, LearnedLayer):
                module.weight.add_(0.1 * module.weight.std() * torch.randn(module.weight.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def result(calibrated: Calibrated, student: nn.Module) -> Calibrated:
    return learned(calibrated, student)


def rounded(calibrated: Calibrated, runtime: Rounding) -> nn.Module:
    return quantize(rewrite(calibrated.network, runtime.form), runtime.operators, runtime.arithmetic, calibrated.ranges)


def logits(network: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(IMAGES)).numpy()


def limits(result: Calibrated, place: str, dtype: Signedness) -> tuple[float, float]:
    """The lowest and highest number that the range of a place can hold."""
    affine = Affine.of_range(*result.ranges[place], dtype)
    lowest = 0 if dtype == "uint8" else -128
    return significant((lowest - affine.zero_point) * affine.scale), significant((lowest + 255 - affine.zero_point) * affine.scale)


def significant(value: float) -> float:
    return float(f"{value:.5g}")


def static_places(student: nn.Module) -> dict[str, LearnedLayer]:
    return {name: module for name, module in student.named_modules() if isinstance(module, LearnedLayer) and module.input is not None}


# rounding and its gradients


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-3.0, -0.5), (0.0, 1.3), (0.2, 7.0), (-0.001, 9.1), (0.0, 0.0)])
def test_a_range_rounds_as_what_is_exported(low: float, high: float) -> None:
    torch.manual_seed(0)
    x, learns = 4 * torch.randn(1000), Range(low, high)
    assert torch.equal(learns(x), Affine.of_range(low, high, "int8").round_trip(x))
    with torch.no_grad():
        learns.logarithms.copy_(torch.tensor([0.4, -0.2]))
    first, last = learns.ends().tolist()
    assert (first, last) == pytest.approx((min(low, 0) * np.exp(0.4), max(high, 0) * np.exp(-0.2)), rel=1e-6)
    assert torch.equal(learns(x), Affine.of_range(first, last, "int8").round_trip(x))


def straight(x: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


def test_gradients_are_those_of_straight_through_rounding() -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(500, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    learns = Range(-1.1, 0.7)
    given = x.float().requires_grad_()
    learns(given).backward(upstream.float())

    reference = x.clone().requires_grad_()
    logarithms = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor([-1.1, 0.7], dtype=torch.float64) * logarithms.exp()
    scale = (high - low) / 255
    zero_point = straight(-128 - low / scale)
    integers = torch.clamp(straight(reference / scale) + zero_point, -128 - 1e-9, 127 + 1e-9)  # the ends are within
    ((integers - zero_point) * scale).backward(upstream)

    assert 0 < (reference.grad == 0).sum() < 400  # some are clipped
    torch.testing.assert_close(given.grad, reference.grad.float())  # type: ignore[union-attr]
    # to half a step in 255, by which the zero point is rounded
    torch.testing.assert_close(learns.logarithms.grad, logarithms.grad.float(), rtol=0.01, atol=0.05)  # type: ignore[union-attr]


def test_the_step_follows_the_error_that_it_leaves() -> None:
    """Of values within the range the ends learn nothing else: dy / dscale is the error, in steps (LSQ, equation 3)."""
    x, learns = torch.linspace(-1.09, 0.69, 5000), Range(-1.1, 0.7)
    low, high = learns.ends().tolist()
    errors = ((learns(x) - x) / ((high - low) / 255)).detach()
    learns(x).backward(errors)
    by_step = float(errors.square().sum()) / 255
    assert by_step > 1
    assert learns.logarithms.grad is not None
    assert learns.logarithms.grad.tolist() == pytest.approx([-by_step * low, by_step * high], rel=1e-3)


def test_what_is_half_a_step_past_an_end_is_outside() -> None:
    learns = Range(-1.1, 0.7)
    affine = Affine.of_range(-1.1, 0.7, "int8")
    ends = torch.tensor([(-128 - affine.zero_point), (127 - affine.zero_point)]) * affine.scale
    past = torch.tensor([0.4, 0.6, 0.9, 5.0]) * affine.scale
    x = torch.cat([ends[0] - past, ends[1] + past]).requires_grad_()
    learns(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 0, 0] * 2


def test_ranges_round_in_float32() -> None:
    """Where products are in bfloat16 too, which has no room for 256 steps."""
    x, learns = torch.linspace(-1, 2, 999).bfloat16(), Range(-1.0, 2.0)
    assert learns(x).dtype == torch.float32
    assert torch.equal(learns(x), learns(x.float()))


def test_weights_get_the_gradient_of_the_rounded_ones() -> None:
    torch.manual_seed(0)
    layer = LearnedLayer(nn.Linear(6, 3), None, None)
    x = torch.randn(5, 6)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, 6))
    torch.testing.assert_close(layer(x), x @ IntegerWeight(layer.weight.detach())().T + layer.bias)


# the network


def test_training_starts_at_what_calibration_gave(calibrated: Calibrated) -> None:
    before = {name: value.clone() for name, value in calibrated.network.state_dict().items()}
    fresh = learnable(calibrated, STRICTEST)
    np.testing.assert_array_equal(logits(fresh), logits(rounded(calibrated, STRICTEST[0])))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in calibrated.network.state_dict().items())


def test_what_any_runtime_rounds_is_learned_and_nothing_else(calibrated: Calibrated, student: nn.Module) -> None:
    linears = {name for name, module in calibrated.network.named_modules() if isinstance(module, nn.Linear)}
    late = {name for name in linears if name.startswith(("stages.2.", "stages.3.")) and name.endswith("pointwise")}
    exact = {name for name in linears if name.endswith(("head", "squeeze", "excite"))} | late
    dense = {name for name, module in calibrated.network.named_modules() if isinstance(module, nn.Conv2d)
             and module.groups == 1 and module.in_channels > 4}  # fmt: skip
    assert (len(dense), len(late)) == (4, 4)
    layers = {name: module for name, module in student.named_modules() if isinstance(module, LearnedLayer)}
    assert set(layers) == linears | dense
    assert set(static_places(student)) == (linears - exact) | dense
    answers = {name for name, layer in layers.items() if layer.output is not None}
    # XNNPACK's MLPs, but for those of the last stage
    assert answers == {name for name in linears if name.endswith(("fc1", "fc2")) and not name.startswith("stages.3.")}
    assert not any(isinstance(module, LearnedPoint) for module in student.modules())
    assert sum(isinstance(module, IntegerConstant) for module in student.modules()) == 6
    onnx_alone = learnable(calibrated, [rounding(RECIPE, load_backend("onnx"))])
    assert list(static_places(onnx_alone)) == []


def test_points_learn_where_the_recipe_rounds_them(calibrated: Calibrated) -> None:
    fresh = learnable(calibrated, [Rounding(frozenset({"linear", "attention"}), Arithmetic(activations="uint8"))])
    points = [name for name, module in fresh.named_modules() if isinstance(module, LearnedPoint)]
    assert len(points) == 6 * 4
    with torch.no_grad():
        for module in fresh.modules():
            if isinstance(module, Range):
                module.logarithms.fill_(-1)
    after = learned(calibrated, fresh).ranges
    for name in points:
        low, high = calibrated.ranges[name]
        assert after[name] == pytest.approx((min(low, 0) * np.exp(-1), max(high, 0) * np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("name", backend_names())
def test_what_a_runtime_rounds_with_attention_is_learned_and_nothing_else(calibrated: Calibrated, name: str) -> None:
    """As its own form has it: 1x1 convolutions are linears in some, whose kernels are others."""
    recipe = RECIPE.model_copy(update={"operators": ("linear", "conv", "attention")})
    runtime = rounding(recipe, load_backend(name))
    found = {}
    for network in (rounded(calibrated, runtime), learnable(calibrated, [runtime])):
        static = {name: each for name, each in network.named_modules() if isinstance(each, StaticLayer | LearnedLayer) and each.input}
        found[len(found)] = (
            set(static), {name for name, each in static.items() if each.output},
            {name for name, each in network.named_modules() if isinstance(each, RoundedPoint | LearnedPoint)},
        )  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0][2]) >= 6 * 4


def test_ranges_of_softmaxes_are_learned_alone(calibrated: Calibrated) -> None:
    """Of several the highest value is 1, which makes them no tensor that is read twice."""
    ends = dict.fromkeys((place for place in calibrated.ranges if place.endswith("softmax")), (0.0, 1.0))
    fresh = learnable(
        dataclasses.replace(calibrated, ranges=calibrated.ranges | ends), [Rounding(frozenset({"attention"}), STRICTEST[0].arithmetic)]
    )
    assert len({id(fresh.get_submodule(place).range) for place in ends}) == len(ends) == 6


def test_what_is_read_together_has_one_range(student: nn.Module, result: Calibrated) -> None:
    attention = student.get_submodule("stages.0.blocks.0.attention")
    assert attention.q.input is attention.k.input is attention.v.input  # type: ignore[union-attr]
    assert attention.q.input is not attention.proj.input  # type: ignore[union-attr]
    inputs = {result.ranges[f"stages.0.blocks.0.attention.{name}.input"] for name in "qkv"}
    assert len(inputs) == 1


def test_what_was_learned_is_the_result(calibrated: Calibrated, student: nn.Module, result: Calibrated) -> None:
    before = {name: value.clone() for name, value in calibrated.network.state_dict().items()}
    for name, layer in static_places(student).items():
        kept = result.network.get_submodule(name)
        assert torch.equal(kept.weight, layer.weight)  # type: ignore[arg-type]
        assert not torch.equal(kept.weight, before[f"{name}.weight"])  # type: ignore[arg-type]
        assert result.ranges[f"{name}.input"] != calibrated.ranges[f"{name}.input"]
    assert result.ranges["head.input"] == calibrated.ranges["head.input"]  # nothing rounds it
    assert all(torch.equal(value, before[name]) for name, value in calibrated.network.state_dict().items())


# artifacts


def test_the_integers_are_those_that_were_trained(calibrated: Calibrated) -> None:
    """Trained in one runtime's arithmetic, the student and what is exported for that runtime are the same function."""
    fresh = learnable(calibrated, STRICTEST)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = learned(calibrated, fresh)
    np.testing.assert_array_equal(logits(rounded(after, STRICTEST[0])), logits(fresh))
    assert sqnr_db(logits(fresh), logits(calibrated.network)) < 30


def artifact(backend: str, model: GCViT, calibrated: Calibrated, folder: Path) -> Path:
    return lower_quantized(backend, calibrated, describe_model(model), RECIPE, folder).path


def test_openvino_has_the_learned_ranges(model: GCViT, student: nn.Module, result: Calibrated, tmp_path: Path) -> None:
    graph = openvino.Core().read_model(artifact("openvino", model, result, tmp_path))
    rounded = [node for node in graph.get_ops() if node.get_type_name() == "FakeQuantize"]
    found = {tuple(significant(float(node.input_value(end).get_node().data.reshape(()))) for end in (3, 4)) for node in rounded}
    unused = "stages.2.global_query", "stages.3.global_query"  # stages of one block, a local one
    used = [name for name in static_places(student) if not name.startswith(unused)]
    assert found == {limits(result, f"{name}.input", "uint8") for name in used}
    assert len(found) > 30


@pytest.mark.parametrize("backend", ["executorch", "openvino", "onnx"])
def test_artifacts_answer_as_the_simulation(backend: str, model: GCViT, calibrated: Calibrated, result: Calibrated, tmp_path: Path) -> None:
    runtime = load_backend(backend)
    run = runtime.load(artifact(backend, model, result, tmp_path), 1)
    answers = np.concatenate([run(image[None]) for image in IMAGES])
    rounds = rounding(RECIPE, runtime)
    simulated = sensitivity.logits(rounded(result, rounds), list(IMAGES[:, None]))
    assert sqnr_db(answers, simulated) > 45
    if backend != "onnx":  # which finds all scales when it runs
        recalibrated = sensitivity.logits(rounded(dataclasses.replace(result, ranges=calibrated.ranges), rounds), list(IMAGES[:, None]))
        assert sqnr_db(answers, simulated) > sqnr_db(answers, recalibrated) + 6  # with the calibrated ranges it would be another network
    assert sqnr_db(answers, logits(deploy(model))) < 25  # far from float: what was learned here is not what float computes
