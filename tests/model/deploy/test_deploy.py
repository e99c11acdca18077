"""The deploy form: the same logits in every way it can be written, and the structure that runtimes need."""

import gc
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcvit_edge.data import default_preprocessing, read_image
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.model.variants import VARIANTS

FORMS = [
    *(Form(norm=norm, attention=attention) for norm, attention in itertools.product(("operator", "products"), ("windows", "bmm"))),
    Form(norm="operator", attention="operator"),
    Form(norm="products", attention="bmm", pointwise="conv"),
]
SHAPES = {
    "plain": {},
    "layer_scale": {"layer_scale": 0.1, "mlp_ratio": 2.0},
    "larger": {"img_size": 96},
    "wide": {"img_size": (64, 96), "layer_scale": 0.1},
    "smallest": {"img_size": 32},
    "windows in every stage": {"window_size": (4, 2, 2, 1)},
    "one window in every stage": {"img_size": 32, "window_size": (8, 4, 2, 1)},
    "local blocks only": {"depths": (1, 1, 1, 1)},
    "odd depths": {"depths": (3, 1, 2, 3)},
    "timm's squeeze": {"dim": 24, "num_heads": (2, 2, 4, 4)},
    "one grey class": {"in_chans": 1, "num_classes": 1},
    "drop path": {"drop_path": 0.3},
}
forms = pytest.mark.parametrize("form", FORMS, ids=[f"{form.norm}-{form.attention}-{form.pointwise}" for form in FORMS])


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def images(model, batch=1):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, model.config.in_chans, *model.config.img_size, generator=generator)


def exported(model, form):
    return torch.export.export(rewrite(deploy(model), form), (images(model),)).graph


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_same_logits_as_the_training_form(make_model, shape, form):
    model = make_model(**SHAPES[shape])
    small = rewrite(deploy(model), form)
    for batch in (1, 3):
        x = images(model, batch)
        with torch.no_grad():
            expected, actual = model(x), small(x)
        assert actual.shape == (batch, model.config.num_classes)
        assert relative(actual, expected) < 1e-5
        if batch == 3 and expected.shape[1] > 1:
            assert relative(expected[1:], expected[:1].expand(2, -1)) > 1e-2  # logits that do say something


@forms
def test_logits_do_not_depend_on_the_rest_of_the_batch(tiny_model, form):
    small = rewrite(deploy(tiny_model), form)
    x = images(tiny_model, 4) * torch.tensor([1.0, 30.0, 0.1, 1.0]).view(4, 1, 1, 1)
    with torch.no_grad():
        batch = small(x)
        single = torch.cat([small(image[None]) for image in x])
        turned = small(x.flip(0)).flip(0)
    torch.testing.assert_close(batch, single, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(batch, turned, rtol=1e-5, atol=2e-5)


class Recorded(TorchDispatchMode):
    """Operators as the network runs, in a fraction of the time of an export: (operator, inputs, output)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result


def calls(model, form, batch):
    with torch.no_grad(), Recorded() as recorded:
        rewrite(deploy(model), form)(images(model, batch))
    return recorded.calls


def axes(results):
    results = results if isinstance(results, (tuple, list)) else [results]
    return [result.ndim for result in results if isinstance(result, torch.Tensor)]


@pytest.mark.parametrize("batch", [1, 3])
@forms
def test_no_tensor_has_more_than_four_axes(make_model, form, batch):
    for shape in ("plain", "wide", "windows in every stage"):
        ranks = [rank for _, _, result in calls(make_model(**SHAPES[shape]), form, batch) for rank in axes(result)]
        assert len(ranks) > 300
        assert max(ranks) == 4


def window_moves(calls, config):
    """Rank-4 transposes of whole rows of windows, by stage: their last axis is a window's row of channels."""
    moves = [0] * 4
    for operator, args, _ in calls:
        if operator is torch.ops.aten.permute.default and list(args[1]) == [0, 2, 1, 3]:
            for stage in range(4):
                moves[stage] += args[0].shape[3] == config.window(stage)[1] * config.stage_dim(stage)
    return moves


@pytest.mark.parametrize("batch", [1, 3])
@forms
def test_a_stage_partitions_once_and_reverses_once(make_model, form, batch):
    model = make_model(depths=(3, 3, 2, 2))
    assert window_moves(calls(model, form, batch), model.config) == [2, 2, 0, 0]
    model = make_model(img_size=(64, 96), window_size=None)
    assert window_moves(calls(model, form, batch), model.config) == [2, 2, 0, 0]


@forms
def test_operators_are_those_of_the_form(tiny_model, form):
    nodes = exported(tiny_model, form).nodes
    assert max(rank for node in nodes for rank in axes(node.meta.get("val"))) == 4  # what is exported is what was run
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    norms = 8 * 2 + 4 * 2 + 1  # two a block, two in the stem and in each downsampler, the last one

    def count(part):
        return sum(part in target for target in targets)

    assert count("layer_norm") == 0
    assert count("rms_norm") == (norms if form.norm == "operator" else 0)
    assert count("rsqrt") == (norms if form.norm == "products" else 0)
    assert count("onnx.Attention") == (8 if form.attention == "operator" else 0)
    assert count("aten.bmm") == (16 if form.attention == "bmm" else 0)
    assert count("aten.matmul") == (16 if form.attention == "windows" else 0)
    assert count("aten.softmax") == (0 if form.attention == "operator" else 8)
    assert count("aten.index") == 0  # the position bias is a constant
    assert count("repeat") == 0
    assert count("expand") == (0 if form.attention == "bmm" else 2)  # the global query, in two stages of several windows


def test_pointwise_convolutions_are_linears(tiny_model):
    kernels = [module.kernel_size for module in deploy(tiny_model).modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(kernels) > 10
    assert set(kernels) == {(3, 3)}


def test_position_bias_and_layer_scale_are_folded(make_model):
    small = deploy(make_model(layer_scale=0.1))
    names = [name for name, _ in small.named_parameters()]
    assert not any("gamma" in name or "relative_position" in name for name in names)
    biases = [buffer.shape for name, buffer in small.named_buffers() if name.endswith("position_bias.value")]
    assert biases[:2] == [(1, 1, 4, 4), (1, 1, 4, 4)]
    assert len(biases) == 8


@forms
def test_what_norms_read_is_centred(make_model, form):
    """Every layer that writes what a norm reads writes vectors of mean 0; only then is an RMS norm a LayerNorm."""
    model = make_model(layer_scale=0.1)
    small, means = rewrite(deploy(model), form), []
    for module in small.modules():
        if type(module).__name__ in ("RMSNorm", "AffineNorm"):
            module.register_forward_pre_hook(lambda module, inputs: means.append(float(inputs[0].mean(-1).abs().max())))
    with torch.no_grad():
        small(images(model))
    assert len(means) == 25
    assert max(means) < 1e-5


@forms
def test_model_is_not_changed(make_model, form):
    model = make_model(layer_scale=0.1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config, text = model.config, str(model)
    small = rewrite(deploy(model), form)
    assert not small.training
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    assert list(model.state_dict()) == list(before)
    assert (model.config, str(model)) == (config, text)
    assert [name for name, module in model.named_modules() if not module.training] == []


def test_later_changes_of_the_deploy_form_do_not_reach_the_model(tiny_model):
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    small = deploy(tiny_model)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    assert [key for key, value in tiny_model.state_dict().items() if not torch.equal(value, before[key])] == []


def test_no_head(make_model):
    with pytest.raises(ValueError, match="has no head; create it with num_classes > 0"):
        deploy(make_model(features_only=True))


def test_exported_program_is_the_model(tiny_model):
    x = images(tiny_model)
    program = torch.export.export(rewrite(deploy(tiny_model), Form(norm="products", attention="bmm")), (x,)).module()
    with torch.no_grad():
        assert relative(program(x), tiny_model(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_official_variant(make_model, request, name):
    """Random weights at full size; a real image where the reference data is there."""
    model = make_model(name, num_classes=100)
    size = model.config.img_size
    try:
        photo = min((request.getfixturevalue("shared") / "data" / "flowers" / "val").rglob("*.jpg"))
        x = torch.from_numpy(read_image(photo, default_preprocessing(size, 0.875)))
    except pytest.skip.Exception:
        x = images(model)
    with torch.no_grad():
        expected = model(x)
        errors = []
        for form in (Form(norm="products", attention="bmm"), Form(norm="operator", attention="windows")):
            small = rewrite(deploy(model), form)
            errors.append(relative(small(x), expected))
            del small
            gc.collect()
    del model
    gc.collect()
    assert max(errors) < 1e-4
