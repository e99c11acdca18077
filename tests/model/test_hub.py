"""Checkpoints of the Hugging Face hub; its client is real, but for the download."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from gcvit_edge.data import Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import read_checkpoint
from gcvit_edge.model.create import create_model, load_model
from gcvit_edge.model.info import NVLABS_LICENCE, UNKNOWN_LICENCE, Origin


def hub_folder(tmp_path, model, name, config):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    state = dict(model.state_dict())
    save_file(state, folder / name) if name.endswith(".safetensors") else torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


SHAPE = {"dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 8, "img_size": 64}
HUB = "hf-hub:timm/gcvit_mine.in1k"
TIMM_CONFIG = {
    "architecture": "gcvit_xxtiny",
    "num_classes": 8,
    "label_names": ["alpha", "beta/gamma", "c", "d", "e", "f", "g", "h"],
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.2, 0.1],
        "license": "apache-2.0",
    },
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.pth", "weights.pth.tar"])
def test_hub(tiny_model, tmp_path, monkeypatch, name):
    asked = []
    folder = hub_folder(tmp_path, tiny_model, name, TIMM_CONFIG)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(folder))
    model, info = load_model("hf-hub:timm/gcvit_mine.in1k")
    assert asked == ["timm/gcvit_mine.in1k"]
    assert all(torch.equal(value, tiny_model.state_dict()[name]) for name, value in model.state_dict().items())
    assert info.labels.names == tuple(TIMM_CONFIG["label_names"])
    assert info.labels.folders[1] == "beta_gamma"
    assert info.preprocessing == Preprocessing(
        size=(64, 64), resize=80, mode="shortest_edge", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1)
    )
    # timm's copies are NVIDIA's weights, whatever timm's configuration says
    assert info.origin == Origin(source="hf-hub:timm/gcvit_mine.in1k", layout="timm", licence=NVLABS_LICENCE)


@pytest.mark.parametrize(
    "changes",
    [{"interpolation": "lanczos"}, {"mean": [0.5]}, {"std": [0.3, 0.2, 0.0]}, {"input_size": 224}, {"crop_mode": "border"},
     {"crop_mode": ["center"]}],
)  # fmt: skip
def test_hub_with_preprocessing_that_cannot_be_done(tiny_model, tmp_path, monkeypatch, changes):
    folder = hub_folder(
        tmp_path, tiny_model, "model.safetensors", TIMM_CONFIG | {"pretrained_cfg": TIMM_CONFIG["pretrained_cfg"] | changes}
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    with pytest.raises(UserError, match=f"the preprocessing that {HUB} asks for cannot be done: .*; give --preprocessing FILE"):
        load_model(HUB)
    assert create_model(**SHAPE, weights=HUB).head is not None
    mine = Preprocessing(size=(64, 64))
    assert load_model(HUB, preprocessing=mine)[1].preprocessing == mine


def test_hub_with_a_crop_that_cannot_be_done_says_which(tiny_model, tmp_path, monkeypatch):
    border = TIMM_CONFIG | {"pretrained_cfg": TIMM_CONFIG["pretrained_cfg"] | {"crop_mode": "border"}}
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", border)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    with pytest.raises(UserError, match="cannot be done: crop_mode 'border', expected 'center' or 'squash'; give --preprocessing FILE"):
        load_model(HUB)


def test_hub_without_a_crop_mode_is_cropped_in_the_centre(tiny_model, tmp_path, monkeypatch):
    silent = TIMM_CONFIG | {"pretrained_cfg": {key: value for key, value in TIMM_CONFIG["pretrained_cfg"].items() if key != "crop_mode"}}
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", silent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    assert read_checkpoint(HUB).preprocessing.mode == "shortest_edge"


def test_hub_of_somebody_else(tiny_model, tmp_path, monkeypatch):
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    checkpoint = read_checkpoint("hf-hub:somebody/gcvit")
    assert (checkpoint.labels, checkpoint.preprocessing) == (None, None)
    assert checkpoint.origin.licence == UNKNOWN_LICENCE


def test_hub_squashed_crop(tiny_model, tmp_path, monkeypatch):
    squash = TIMM_CONFIG | {"pretrained_cfg": TIMM_CONFIG["pretrained_cfg"] | {"crop_mode": "squash", "crop_pct": 1.0}}
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", squash)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    preprocessing = read_checkpoint("hf-hub:somebody/gcvit").preprocessing
    assert (preprocessing.mode, preprocessing.size) == ("squash", (64, 64))


def test_hub_offline(monkeypatch):
    def offline(repo, **_):
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot download timm/gcvit_tiny\.in1k from the Hugging Face hub: .*give its path"):
        read_checkpoint("hf-hub:timm/gcvit_tiny.in1k")


def test_hub_name_that_cannot_be():
    """Refused by the hub's own client before any connection."""
    with pytest.raises(UserError, match="cannot download a/b/c from the Hugging Face hub"):
        read_checkpoint("hf-hub:a/b/c")


def test_hub_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(UserError, match=r"holds no \.safetensors or \.pth file"):
        read_checkpoint("hf-hub:somebody/empty")


NAMES = TIMM_CONFIG["label_names"]


@pytest.mark.parametrize(
    "config",
    [
        TIMM_CONFIG | {"label_names": {str(number): name for number, name in reversed(list(enumerate(NAMES)))}},
        {key: value for key, value in TIMM_CONFIG.items() if key != "label_names"}
        | {"pretrained_cfg": TIMM_CONFIG["pretrained_cfg"] | {"label_names": NAMES}},
        {"architecture": "gcvit_xxtiny", "labels": NAMES} | TIMM_CONFIG["pretrained_cfg"],
    ],
    ids=["by number", "inside", "older"],
)
def test_hub_names_wherever_timm_has_them(tiny_model, tmp_path, monkeypatch, config):
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    info = load_model(HUB)[1]
    assert info.labels.names == tuple(NAMES)
    assert (info.preprocessing.resize, info.preprocessing.mean) == (80, (0.5, 0.4, 0.3))


def test_hub_names_of_some_classes_are_refused(tiny_model, tmp_path, monkeypatch):
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", TIMM_CONFIG | {"label_names": {"0": "a", "7": "h"}})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    with pytest.raises(UserError, match=r"label_names of config\.json is no list of class names, .*; give --labels FILE"):
        read_checkpoint(HUB)


@pytest.mark.parametrize("config", [{"label_names": None, "pretrained_cfg": None}, []])
def test_hub_that_says_nothing(tiny_model, tmp_path, monkeypatch, config):
    folder = hub_folder(tmp_path, tiny_model, "model.safetensors", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    checkpoint = read_checkpoint(HUB)
    assert (checkpoint.labels, checkpoint.preprocessing) == (None, None)


def test_hub_with_a_pickle_alone(tiny_model, tmp_path, monkeypatch):
    """Asked for only where there is nothing else: most have both."""
    asked = []
    folder = hub_folder(tmp_path, tiny_model, "pytorch_model.bin", TIMM_CONFIG)
    empty = tmp_path / "empty"
    empty.mkdir()

    def download(repo, allow_patterns):
        asked.append(allow_patterns)
        return str(folder if "pytorch_model.bin" in allow_patterns else empty)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model(HUB)[1].labels.names == tuple(NAMES)
    assert len(asked) == 2
