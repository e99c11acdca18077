"""Making networks: from a variant, from custom shapes, and from a checkpoint with all that travels with it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import Checkpoint, config_of, save_checkpoint
from gcvit_edge.model.create import create_model, describe_model, load_model
from gcvit_edge.model.info import NVLABS_LICENCE, UNKNOWN_LICENCE, Origin
from gcvit_edge.model.variants import VARIANTS

TABLE = "stages.{}.blocks.{}.attn.rel_pos.relative_position_bias_table"
SHAPE = {"dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "img_size": 64}


@pytest.fixture
def saved(tiny_model, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny_model, describe_model(tiny_model), path, half=False)
    return path


@pytest.fixture(scope="module")
def xxtiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "official.safetensors"
    model = create_model("gcvit_xxtiny", num_classes=2)
    save_checkpoint(model, describe_model(model), path, half=True)
    return path


def test_variant_by_either_spelling():
    model = create_model("gc_vit_xxtiny", num_classes=3)
    assert model.config == replace(VARIANTS["gcvit_xxtiny"], num_classes=3)
    assert not model.training


def test_unknown_variant():
    with pytest.raises(UserError, match="did you mean 'gcvit_xxtiny'"):
        create_model("gcvit_xxtny")


def test_every_part_of_the_shape_can_be_changed():
    model = create_model(
        "gcvit_small", num_classes=4, img_size=128, drop_path=0.1, in_chans=2, dim=8, depths=(1, 2, 1, 2),
        num_heads=(1, 1, 2, 2), window_size=(4, 4, 4, 2), mlp_ratio=1.5, layer_scale=0.1,
    )  # fmt: skip
    config = model.config
    assert (config.img_size, config.window_size, config.depths, config.num_heads) == ((128, 128), (4, 4, 4, 2), (1, 2, 1, 2), (1, 1, 2, 2))
    assert [rate.drop_path.rate for stage in model.stages for rate in stage.blocks] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert model.stages[0].blocks[0].mlp.fc1.weight.shape == (12, 8)
    assert model.stages[3].blocks[1].ls2.gamma.tolist() == pytest.approx([0.1] * 64)
    with torch.no_grad():
        assert model(torch.randn(2, 2, 128, 128)).shape == (2, 4)


@pytest.mark.parametrize("size", [100, (64, 100), 48, 0])
def test_input_size_must_be_a_multiple_of_32(size):
    with pytest.raises(UserError, match=r"img_size .*multiple of 32|must be positive"):
        create_model(img_size=size)


def test_weights_bring_their_number_of_classes(saved, tiny_model):
    model = create_model(weights=saved, **SHAPE)
    assert model.config.num_classes == 8
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), tiny_model(x))


def test_features_of_weights_are_those_of_the_classifier(saved, tiny_model):
    model = create_model(weights=saved, **SHAPE, features_only=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for feature, expected in zip(model(x), tiny_model.forward_features(x), strict=True):
            assert torch.equal(feature, expected)


def test_another_number_of_classes(saved):
    with pytest.raises(UserError, match=r"has 8 classes, but 5 were asked for; leave num_classes out or set it to 8"):
        create_model(weights=saved, **SHAPE, num_classes=5)


def test_another_number_of_channels(saved):
    with pytest.raises(UserError, match=r"has 3 input channels, the model 1"):
        create_model(weights=saved, **SHAPE, in_chans=1)


def test_another_custom_shape(saved):
    with pytest.raises(UserError, match=r"not of the requested shape.*its shape is .*'depths': \(2, 2, 2, 2\)"):
        create_model(weights=saved, **SHAPE | {"depths": (2, 2, 3, 2)})


def test_another_variant_names_the_right_one(xxtiny):
    with pytest.raises(UserError, match="is not a gcvit_xtiny; it is a gcvit_xxtiny: give --model gcvit_xxtiny"):
        load_model(str(xxtiny), "gcvit_xtiny")


def test_same_weights_with_and_without_layer_scale_differ(saved):
    with pytest.raises(UserError, match="not of the requested shape"):
        create_model(weights=saved, **SHAPE, layer_scale=1e-5)


@pytest.mark.parametrize("size", [96, (64, 96), (96, 32)])
def test_position_bias_is_interpolated_for_another_input_size(tiny_model, tmp_path, size):
    """A bias that depends on the row only, or on nothing, keeps that property; its heads stay apart."""
    with torch.no_grad():
        for stage in range(4):
            blocks = tiny_model.stages[stage].blocks
            side = 2 * tiny_model.config.window(stage)[0] - 1
            rows = torch.arange(float(side))[:, None].expand(side, side).reshape(-1, 1)
            table = blocks[0].attn.rel_pos.relative_position_bias_table
            table.copy_(rows * torch.arange(1.0, table.shape[1] + 1))
            blocks[1].attn.rel_pos.relative_position_bias_table.fill_(2.5)
    path = tmp_path / "rows.safetensors"
    save_checkpoint(tiny_model, describe_model(tiny_model), path, half=False)
    model = create_model(weights=path, **SHAPE | {"img_size": size})
    state = model.state_dict()
    for stage in range(4):
        height, width = model.config.window(stage)
        heads = model.config.num_heads[stage]
        table = state[TABLE.format(stage, 0)].view(2 * height - 1, 2 * width - 1, heads)
        torch.testing.assert_close(table, table[:, :1].expand_as(table))
        torch.testing.assert_close(table, table[..., :1] * torch.arange(1.0, heads + 1))
        middle = tiny_model.config.window(stage)[0] - 1.0  # the middle row is the same distance, 0, at any size
        torch.testing.assert_close(table[height - 1, :, 0], torch.full((2 * width - 1,), middle))
        if height > 1:
            assert (table[1:, 0, 0] > table[:-1, 0, 0]).all()
        torch.testing.assert_close(state[TABLE.format(stage, 1)], torch.full(((2 * height - 1) * (2 * width - 1), heads), 2.5))
    others = {key for key in state if "relative_position_bias_table" not in key}
    assert all(torch.equal(state[key], tiny_model.state_dict()[key]) for key in others)
    with torch.no_grad():
        assert model(torch.randn(1, 3, *model.config.img_size)).isfinite().all()


def test_loaded_model_recognises_its_variant(xxtiny):
    model, info = load_model(str(xxtiny))
    assert model.config == replace(VARIANTS["gcvit_xxtiny"], num_classes=2)
    assert info.name == "gcvit_xxtiny"


@pytest.mark.parametrize(
    ("shape", "asked", "size"),
    [
        ({"img_size": 64}, "gcvit_xxtiny", 64),  # trained at another size than the official weights
        ({"img_size": 64}, "gc_vit_xxtiny", 64),
        ({"img_size": 64}, None, 64),
        ({"img_size": 224}, "gcvit_xxtiny", 224),
    ],
)
def test_a_name_does_not_change_the_input_size_of_weights(shape, asked, size, tmp_path):
    model = create_model("gcvit_xxtiny", num_classes=2, **shape)
    save_checkpoint(model, describe_model(model), tmp_path / "mine.safetensors", half=True)
    loaded, info = load_model(str(tmp_path / "mine.safetensors"), asked)
    assert loaded.config.img_size == info.preprocessing.size == (size, size)


def test_the_name_of_another_size_asks_for_it():
    def trained(size):
        return Checkpoint({}, replace(VARIANTS["gcvit_large"], img_size=(size, size)), Origin(source="x", layout="timm", licence="MIT"))

    assert config_of(trained(224), "gcvit_large_384_21k").img_size == (384, 384)
    assert config_of(trained(384), "gcvit_large_384_21k").img_size == (384, 384)
    assert config_of(trained(96), "gcvit_large").img_size == (96, 96)
    assert config_of(trained(96), "gcvit_tiny") == VARIANTS["gcvit_tiny"]  # which load_weights refuses


def test_loaded_model_brings_what_was_saved(tiny_model, tmp_path):
    labels = Labels(names=("a/b", *"cdefghi"), folders=("n01", *"cdefghi"))
    preprocessing = Preprocessing(size=(64, 64), resize=80, mode="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
    info = describe_model(tiny_model, labels, preprocessing)
    save_checkpoint(tiny_model, info, tmp_path / "own.safetensors", half=False)
    model, loaded = load_model(str(tmp_path / "own.safetensors"))
    assert loaded == info
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), tiny_model(x))


def test_given_labels_and_preprocessing_win(saved):
    labels, preprocessing = Labels.of("stuvwxyz"), Preprocessing(size=(64, 64), resize=64)
    _, info = load_model(str(saved), labels=labels, preprocessing=preprocessing)
    assert (info.labels, info.preprocessing) == (labels, preprocessing)


def test_foreign_checkpoint_gets_defaults(golden):
    _, timm = load_model(str(golden / "timm_plain.safetensors"))
    assert timm.name == "gcvit_custom"
    assert timm.labels.names == tuple("0123456789")
    assert timm.preprocessing == Preprocessing(size=(224, 224), resize=256)
    assert (timm.origin.source, timm.origin.layout, timm.origin.licence) == ("timm_plain.safetensors", "timm", UNKNOWN_LICENCE)
    _, nvlabs = load_model(str(golden / "nvlabs_plain.pth.tar"))
    assert (nvlabs.origin.layout, nvlabs.origin.licence) == ("nvlabs", NVLABS_LICENCE)


def test_wrong_number_of_labels(saved):
    with pytest.raises(UserError, match="3 labels were given for 8 classes"):
        load_model(str(saved), labels=Labels.of("abc"))


def test_preprocessing_of_another_size(saved):
    with pytest.raises(UserError, match=r"preprocessing makes \(224, 224\) images, the model takes \(64, 64\)"):
        load_model(str(saved), preprocessing=Preprocessing())


def test_loaded_model_needs_a_head(make_model, tmp_path):
    model = make_model(features_only=True)
    save_checkpoint(model, describe_model(model), tmp_path / "features.safetensors", half=False)
    with pytest.raises(UserError, match="has no classifier head"):
        load_model(str(tmp_path / "features.safetensors"))


@pytest.mark.parametrize("change", [{"img_size": (64, 96)}, {"img_size": 128, "window_size": (2, 2, 4, 2)}])
def test_saved_model_of_any_shape_loads_again(make_model, tmp_path, change):
    model = make_model(**change)
    save_checkpoint(model, describe_model(model), tmp_path / "own.safetensors", half=False)
    loaded, _ = load_model(str(tmp_path / "own.safetensors"))
    assert loaded.config.img_size == model.config.img_size
    x = torch.randn(1, 3, *model.config.img_size)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_description_of_a_model_in_memory(tiny_model):
    info = describe_model(tiny_model)
    assert info.name == "gcvit_custom"
    assert info.labels == Labels.of("01234567")
    assert info.preprocessing == Preprocessing(size=(64, 64), resize=73)
    assert (info.origin.source, info.origin.layout, info.origin.licence) == ("made in memory", "none", UNKNOWN_LICENCE)
    assert (info.config["dim"], info.config["depths"], info.config["num_classes"]) == (16, [2, 2, 2, 2], 8)


@pytest.mark.parametrize("size", [(256, 192), (384, 288), (288, 384), (64, 32), (160, 416)])
def test_weights_of_images_that_are_not_square(make_model, tmp_path, size):
    """A file without metadata says how long the tables of position biases are, from which both sides follow, but not their order."""
    model = make_model(img_size=size)
    path = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), path)
    same = create_model(weights=path, **SHAPE | {"img_size": size})
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())
    either = f"made for {max(size)}x{min(size)} or {min(size)}x{max(size)} pixels"
    with pytest.raises(UserError, match=either):
        load_model(str(path))
    with pytest.raises(UserError, match=either):
        create_model(weights=path, **SHAPE | {"img_size": 64})
    loaded, info = load_model(str(path), preprocessing=Preprocessing(size=size))
    assert loaded.config.img_size == info.preprocessing.size == size
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    longer = tuple(2 * side for side in size)  # whose windows have the same orientation
    larger = create_model(weights=path, **SHAPE | {"img_size": longer}).state_dict()[TABLE.format(0, 0)]
    whole = tmp_path / "whole.safetensors"
    save_checkpoint(model, describe_model(model), whole, half=False)
    assert torch.equal(larger, create_model(weights=whole, **SHAPE | {"img_size": longer}).state_dict()[TABLE.format(0, 0)])


@pytest.mark.parametrize(
    ("size", "windows", "sizes"),
    [(64, (8, 4, 2, 1), "32x32 or 64x64"), (32, (8, 4, 2, 1), "32x32 or 64x64"), (128, (2, 16, 8, 4), None), (64, (4, 2, 4, 2), None)],
)
def test_windows_of_their_own(size, windows, sizes, tmp_path):
    """Their input size follows from the poolings of the global queries; of one pooling and none there is one block."""
    shape = {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 3, "img_size": size, "window_size": windows}
    model, path = create_model(**shape), tmp_path / "plain.safetensors"
    save_file(model.state_dict(), path)
    if sizes:
        with pytest.raises(UserError, match=f"was made for {sizes} pixels"):
            load_model(str(path))
        loaded, _ = load_model(str(path), preprocessing=Preprocessing(size=(size, size)))
    else:
        loaded, _ = load_model(str(path))
    assert loaded.config == model.config
    image = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(image), model(image))
    assert torch.equal(create_model(weights=path, **shape)(image), model(image))


def test_windows_that_fit_no_input(tmp_path):
    shape = {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 3}
    state = create_model(img_size=64, window_size=(4, 4, 4, 2), **shape).state_dict()
    for key in [key for key in state if "stages.0.global_block.blocks.conv2" in key]:
        state[key.replace("conv2", "conv3")] = state[key].clone()
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"has windows of \[4, 4, 4, 2\] positions and \[3, 1, 1, 1\] poolings, which fit no input size"):
        load_model(str(tmp_path / "odd.safetensors"))


def test_tables_of_no_window_are_refused(make_model, tmp_path):
    state = make_model().state_dict()
    state[TABLE.format(0, 0)] = state[TABLE.format(0, 0)].repeat(2, 1)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"has tables of \[18, 9, 49, 9\] position biases, which are of no windows"):
        load_model(str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("shape", [{"dim": 44, "mlp_ratio": 60 / 44, "num_heads": (1, 2, 4, 8)}, {"mlp_ratio": 2.7}, {"mlp_ratio": 1.1}])
def test_widths_of_mlps_that_are_no_multiples(tmp_path, shape):
    """Their ratio survives in our layout; from plain weights the lowest that gives all four widths is as good, and may be asked for too."""
    shape = SHAPE | shape
    model = create_model(**shape)
    save_checkpoint(model, describe_model(model), tmp_path / "own.safetensors", half=False)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("own", "plain"):
        path = tmp_path / f"{name}.safetensors"
        loaded, info = load_model(str(path))
        for same in (
            loaded,
            create_model(**shape, weights=path),
            create_model(**shape | {"mlp_ratio": info.config["mlp_ratio"]}, weights=path),
        ):
            assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())
        assert name == "plain" or info.config["mlp_ratio"] == shape["mlp_ratio"]
    with pytest.raises(
        UserError, match=rf"not of the requested shape .*'mlp_ratio': 2\.5.* its shape is .*'mlp_ratio': {shape['mlp_ratio']}"
    ):
        create_model(**shape | {"mlp_ratio": 2.5}, weights=tmp_path / "own.safetensors")


def test_shapes_that_are_none():
    with pytest.raises(UserError, match=r"img_size is one side or \(height, width\), got \(64, 64, 64\)"):
        create_model(**SHAPE | {"img_size": (64, 64, 64)})
    with pytest.raises(UserError, match="mlp_ratio must be a number over 0, got nan"):
        create_model(**SHAPE, mlp_ratio=float("nan"))


@pytest.mark.parametrize("mlp_ratio", [-1.0, 0.0, 0.01])
def test_no_mlp_is_refused(mlp_ratio):
    with pytest.raises(UserError, match="every size must be positive"):
        create_model(**SHAPE, mlp_ratio=mlp_ratio)
