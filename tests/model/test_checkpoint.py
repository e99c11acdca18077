"""Checkpoints: every layout and wrapper that is read, and everything that is refused."""

import argparse
import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import read_checkpoint, save_checkpoint, variant_of
from gcvit_edge.model.create import create_model, describe_model, load_model
from gcvit_edge.model.info import NVLABS_LICENCE, UNKNOWN_LICENCE, ModelInfo, Origin
from gcvit_edge.model.layout import infer_config
from gcvit_edge.model.variants import VARIANTS

SHAPE = {"dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "img_size": 64}
GOLDEN_SHAPE = {"dim": 16, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 4, 8)}


def assert_same_state(state, expected):
    assert set(state) == set(expected)
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Lightning(nn.Module):
    """Holds the network as modules of Lightning do."""

    def __init__(self, model):
        super().__init__()
        self.model = model


# What is read


@pytest.mark.parametrize("name", ["plain", "layerscale"])
def test_keys_are_those_of_timm(golden, name):
    shape = {"mlp_ratio": 2.0, "layer_scale": 1e-5} if name == "layerscale" else {}
    model = create_model(**GOLDEN_SHAPE, **shape, num_classes=10)
    theirs = load_file(golden / f"timm_{name}.safetensors")
    assert set(model.state_dict()) == set(theirs)
    read = read_checkpoint(str(golden / f"timm_{name}.safetensors"))
    assert_same_state(read.state, {key: value.float() for key, value in theirs.items()})


@pytest.mark.parametrize(
    ("name", "mlp_ratio", "layer_scale", "se_multiple"),
    [("timm_plain.safetensors", 3, None, 8), ("timm_layerscale.safetensors", 2, 1e-5, 8),
     ("nvlabs_plain.pth.tar", 3, None, 1), ("nvlabs_layerscale.pth.tar", 2, 1e-5, 1)],
)  # fmt: skip
def test_shape_is_read_off_the_tensors(golden, name, mlp_ratio, layer_scale, se_multiple):
    checkpoint = read_checkpoint(str(golden / name))
    config = checkpoint.config
    assert (config.dim, config.depths, config.num_heads) == (16, (2, 2, 3, 2), (1, 2, 4, 8))
    assert (config.mlp_ratio, config.layer_scale, config.se_multiple) == (mlp_ratio, layer_scale, se_multiple)
    assert (config.img_size, config.window_size, config.in_chans, config.num_classes) == ((224, 224), None, 3, 10)
    assert all(value.dtype == torch.float32 for value in checkpoint.state.values())
    assert variant_of(config) is None


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("gcvit_large", 224, "gcvit_large"), ("gcvit_large", 256, "gcvit_large"), ("gcvit_large", 384, "gcvit_large_384_21k"),
        ("gcvit_large_384_21k", 512, "gcvit_large_512_21k"), ("gcvit_xxtiny", 384, "gcvit_xxtiny"),
    ],
)  # fmt: skip
def test_variants_of_one_structure_are_told_apart_by_their_input(name, size, found):
    assert variant_of(replace(VARIANTS[name], img_size=(size, size), num_classes=7)) == found


def test_every_nvlabs_tensor_is_used(golden):
    theirs = torch.load(golden / "nvlabs_layerscale.pth.tar", weights_only=True)["state_dict"]
    weights = [value for key, value in theirs.items() if not key.endswith("relative_position_index")]
    assert len(theirs) - len(weights) == sum(GOLDEN_SHAPE["depths"])
    state = read_checkpoint(str(golden / "nvlabs_layerscale.pth.tar")).state
    assert len(state) == len(weights)
    assert sum(value.double().sum().item() for value in state.values()) == pytest.approx(
        sum(value.double().sum().item() for value in weights), rel=1e-9
    )


def test_licence_of_nvlabs_weights(golden):
    origin = read_checkpoint(str(golden / "nvlabs_plain.pth.tar")).origin
    assert origin == Origin(source="nvlabs_plain.pth.tar", layout="nvlabs", licence="CC-BY-NC-SA-4.0")
    assert read_checkpoint(str(golden / "timm_plain.safetensors")).origin.licence == UNKNOWN_LICENCE


def test_licence_of_nvlabs_weights_survives_being_saved_again(golden, tmp_path):
    model, info = load_model(str(golden / "nvlabs_plain.pth.tar"))
    save_checkpoint(model, info, tmp_path / "again.safetensors", half=True)
    assert load_model(str(tmp_path / "again.safetensors"))[1].origin == info.origin
    assert info.origin.licence == NVLABS_LICENCE


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "state_dict_ema", "model", "model_ema", "ema"])
def test_wrappers(tiny_model, tmp_path, wrapper, suffix):
    state = dict(tiny_model.state_dict())
    path = tmp_path / f"weights{suffix}"
    torch.save(state if wrapper is None else {"epoch": 3, "arch": "gcvit", wrapper: state}, path)
    assert_same_state(read_checkpoint(str(path)).state, state)


def test_nested_wrappers_and_module_prefix(tiny_model, tmp_path):
    state = dict(tiny_model.state_dict())
    path = tmp_path / "weights.pth"
    torch.save({"model": {"state_dict": {f"module.{key}": value for key, value in state.items()}}}, path)
    assert_same_state(read_checkpoint(str(path)).state, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "around",
    [(nn.DataParallel,), (torch.compile,), (Lightning,), (AveragedModel,), (nn.DataParallel, torch.compile), (torch.compile, Lightning),
     (AveragedModel, torch.compile), (torch.compile, AveragedModel, Lightning), (nn.DataParallel, nn.DataParallel)],
)  # fmt: skip
def test_modules_around_the_network(tiny_model, tmp_path, around, suffix):
    module = tiny_model
    for wrap in around:
        module = wrap(module)
    state = module.state_dict()
    assert not set(state) & set(tiny_model.state_dict())
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    assert_same_state(read_checkpoint(str(path)).state, tiny_model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefix_of_some_names_is_kept(tiny_model, tmp_path, suffix):
    state = {f"module.{key}": value for key, value in tiny_model.state_dict().items()} | {"teacher.weight": torch.zeros(1)}
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    with pytest.raises(UserError, match=r"such as (module|teacher)\."):
        read_checkpoint(str(path))


@pytest.mark.parametrize(
    ("wrapper", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("state_dict", "ema")]
)
def test_averaged_weights_win(tiny_model, tmp_path, wrapper, averaged):
    other = {key: value + 1 for key, value in tiny_model.state_dict().items()}
    for name, beside in (("one.pth", {}), ("two.pth", other)):
        torch.save({wrapper: beside, averaged: dict(tiny_model.state_dict())}, tmp_path / name)
        assert_same_state(read_checkpoint(str(tmp_path / name)).state, tiny_model.state_dict())


def test_settings_of_an_average_beside_the_weights_are_no_weights(tiny_model, tmp_path):
    torch.save({"model": dict(tiny_model.state_dict()), "ema": {"decay": 0.99, "updates": 3}}, tmp_path / "one.pth")
    assert_same_state(read_checkpoint(str(tmp_path / "one.pth")).state, tiny_model.state_dict())


def test_arguments_of_the_training_script_beside_the_weights(tiny_model, tmp_path):
    arguments = argparse.Namespace(lr=5e-4, model="gcvit_xxtiny", mean=[0.5, 0.5, 0.5], amp=True)
    torch.save({"epoch": 3, "arch": "gcvit", "state_dict": tiny_model.state_dict(), "args": arguments}, tmp_path / "timm.pth.tar")
    assert_same_state(read_checkpoint(str(tmp_path / "timm.pth.tar")).state, tiny_model.state_dict())


def test_old_pickle_format(tiny_model, tmp_path):
    torch.save(tiny_model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_state(read_checkpoint(str(tmp_path / "old.pth")).state, tiny_model.state_dict())


@pytest.mark.parametrize("half", [False, True])
def test_round_trip(tiny_model, tmp_path, half):
    info = ModelInfo(
        name="gcvit_custom",
        config=describe_model(tiny_model).config,
        labels=Labels(names=("Katze 🐈", *"bcdefgh"), folders=("n0", *"bcdefgh")),
        preprocessing=Preprocessing(size=(64, 64), resize=70, mode="squash", interpolation="bilinear"),
        origin=Origin(source="hf-hub:somebody/something", layout="timm", licence="MIT"),
    )
    path = tmp_path / "own.safetensors"
    save_checkpoint(tiny_model, info, path, half=half)
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16 if half else torch.float32}  # noqa: SIM118
        assert ModelInfo.model_validate_json(file.metadata()["gcvit_edge"]) == info
    checkpoint = read_checkpoint(str(path))
    expected = {key: value.half().float() if half else value for key, value in tiny_model.state_dict().items()}
    assert_same_state(checkpoint.state, expected)
    assert (checkpoint.name, checkpoint.labels, checkpoint.preprocessing) == (info.name, info.labels, info.preprocessing)
    assert checkpoint.origin == info.origin
    assert load_model(str(path))[1] == info


def test_saving_half_does_not_change_the_model(tiny_model, tmp_path):
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    save_checkpoint(tiny_model, describe_model(tiny_model), tmp_path / "own.safetensors", half=True)
    assert_same_state(tiny_model.state_dict(), before)


def test_weights_too_large_for_float16_are_not_saved_as_infinite(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.head.fc.bias[0] = 70_000
    with pytest.raises(UserError, match=r"float16 is too small for head\.fc\.bias: .*; leave --half out"):
        save_checkpoint(model, describe_model(model), tmp_path / "own.safetensors", half=True)
    assert list(tmp_path.iterdir()) == []


def test_trained_checkpoints_are_official_variants(shared):
    for path in sorted((shared / "checkpoints").glob("*.safetensors")):
        record = json.loads(path.with_suffix(".json").read_text())
        checkpoint = read_checkpoint(str(path))
        assert variant_of(checkpoint.config) == record["model"]
        assert checkpoint.config.num_classes == record["num_classes"]


# What is refused


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist; give a \.safetensors or \.pth file, or hf-hub:ID"):
        read_checkpoint(str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match=r"is a folder; give the \.safetensors or \.pth file in it"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_truncated(tiny_model, tmp_path, kind, kept):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_checkpoint(tiny_model, describe_model(tiny_model), path, half=True)
    else:
        torch.save(tiny_model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"cut\.\w+ is (truncated or no|no complete)"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_file_of_another_kind(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="is truncated or no"):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_pickle_that_holds_code_is_refused_and_not_executed(tiny_model, tmp_path, kind):
    path, trace = tmp_path / "code.pth", tmp_path / "executed"
    content = {"state_dict": tiny_model.state_dict(), "extra": Payload(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="holds more than weights, and was not executed"):
        read_checkpoint(str(path))
    assert not trace.exists()
    # the same file does run its code where it is allowed to
    pickle.loads(path.read_bytes()) if kind == "pickle" else torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("key", ["stages.2.downsample.norm1.weight", "stages.1.blocks.1.attn.proj.bias", "stages.3.norm.weight"])
def test_missing_keys(tiny_model, tmp_path, key):
    state = dict(tiny_model.state_dict())
    del state[key]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=rf"does not fit the model: 1 missing \({key}\) keys"):
        create_model(weights=tmp_path / "less.pth", **SHAPE)


def test_extra_keys(tiny_model, tmp_path):
    state = dict(tiny_model.state_dict()) | {"stages.0.blocks.0.adapter.weight": torch.zeros(2), "other": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"does not fit the model: 2 extra \(other, stages\.0\.blocks\.0\.adapter\.weight\) keys"):
        create_model(weights=tmp_path / "more.pth", **SHAPE)


def test_missing_and_extra_keys_are_both_named(tiny_model, tmp_path):
    state = dict(tiny_model.state_dict())
    state["head.fc.offset"] = state.pop("head.fc.bias")
    torch.save(state, tmp_path / "renamed.pth")
    with pytest.raises(UserError, match=r"1 missing \(head\.fc\.bias\) and 1 extra \(head\.fc\.offset\) keys"):
        create_model(weights=tmp_path / "renamed.pth", **SHAPE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tiny_model, tmp_path, value):
    state = {key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}
    state["head.fc.weight"][0, 0] = value
    torch.save(state, tmp_path / "diverged.pth")
    with pytest.raises(UserError, match=r"diverged.pth holds nan or inf in head.fc.weight: the run that made it diverged"):
        load_model(str(tmp_path / "diverged.pth"))


def test_wrong_shapes(tiny_model, tmp_path):
    state = dict(tiny_model.state_dict()) | {"stages.1.blocks.0.attn.proj.weight": torch.zeros(32, 31)}
    torch.save(state, tmp_path / "shapes.pth")
    with pytest.raises(UserError, match=r"wrong shapes: stages\.1\.blocks\.0\.attn\.proj\.weight \(32, 31\) for \(32, 32\)"):
        create_model(weights=tmp_path / "shapes.pth", **SHAPE)


@pytest.mark.parametrize(
    "state",
    [{"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}, {"stem.conv1.weight": torch.zeros(16, 3, 3, 3)},
     {"stem.conv1.weight": torch.zeros(16)}, {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4), "norm.weight": torch.zeros(96)}],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_gcvit_at_all(tmp_path, state, suffix):
    path = tmp_path / f"other{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    with pytest.raises(UserError, match=rf"is no complete GC ViT in timm's or NVlabs' key layout: .* it has {len(state)} keys"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, {"epoch": 3}, {"state_dict": {}}, torch.zeros(2), {1: torch.zeros(2)}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"holds no state_dict|is no complete GC ViT"):
        read_checkpoint(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("metadata", ["{}", "not JSON"])
def test_spoilt_metadata(tiny_model, tmp_path, metadata):
    save_file(tiny_model.state_dict(), tmp_path / "own.safetensors", {"gcvit_edge": metadata})
    with pytest.raises(UserError, match=r"own\.safetensors"):
        read_checkpoint(str(tmp_path / "own.safetensors"))


def test_inferred_shape_of_a_network_without_head(make_model):
    config, _ = infer_config(make_model(features_only=True, in_chans=1).state_dict(), "here")
    assert (config.num_classes, config.in_chans, config.img_size) == (0, 1, (64, 64))
