"""convert and export."""

from pathlib import Path

import numpy as np
import pytest
from commands import GOLDEN, Command
from tiny import Tiny

from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import create_model, describe_model


def test_convert(command: Command, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"class {i}\n" for i in range(_classes())))
    argv = ["convert", "--weights", GOLDEN / "timm_plain.safetensors", "--labels", "labels.txt", "-o", "mine.safetensors"]
    outcome = command(*argv, "--licence", "MIT", "--origin", "a test", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["file"] == "mine.safetensors"
    assert outcome.json["origin"]["licence"] == "MIT"
    assert outcome.json["origin"]["source"] == "a test"
    from gcvit_edge import load_model

    _, info = load_model(str(tmp_path / "mine.safetensors"))
    assert (info.origin.licence, info.labels.names[1]) == ("MIT", "class 1")
    assert "mine.safetensors exists; give --force" in command.refuses(*argv)
    whole = (tmp_path / "mine.safetensors").stat().st_size
    assert command(*argv, "--force", "--half").code == 0
    assert (tmp_path / "mine.safetensors").stat().st_size < 0.6 * whole


def _classes() -> int:
    return np.load(GOLDEN / "timm_plain_logits.npy").shape[1]


def test_convert_refuses(command: Command, tmp_path: Path) -> None:
    weights = GOLDEN / "timm_plain.safetensors"
    assert "--output must end in .safetensors, got a.pth" in command.refuses("convert", "--weights", weights, "-o", "a.pth")
    assert "checkpoint none.pth does not exist" in command.refuses("convert", "--weights", "none.pth", "-o", "a.safetensors")


def test_convert_refuses_a_folder_that_does_not_exist(command: Command) -> None:
    message = command.refuses("convert", "--weights", GOLDEN / "timm_plain.safetensors", "-o", "none/a.safetensors")
    assert "cannot write none/a.safetensors" in message


def test_export(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    outcome = command("export", "--weights", tiny.weights, "--backends", "onnx", "-o", "float.zip", "--json")
    assert outcome.code == 0, outcome.err
    (entry,) = outcome.json["artifacts"]
    assert (entry["backend"], entry["precision"], entry["file"]) == ("onnx", "float", "model.float.onnx")
    assert entry["parity_db"] > 80
    assert outcome.json["bundle"] == "float.zip"
    assert [path.name for path in tmp_path.iterdir()] == ["float.zip"]
    assert command("verify", "float.zip", "--json").json["replays"][0]["sqnr_db"] > 80
    assert command("predict", "float.zip", tiny.image("yellow"), "--json").json[0]["classes"][0]["label"] == "yellow"
    message = command.refuses("export", "--weights", tiny.weights, "--backends", "onnx", "-o", "float.zip")
    assert "float.zip exists and holds a bundle" in message


def test_export_refuses(command: Command, tiny: Tiny) -> None:
    assert "did you mean 'openvino'?" in command.refuses("export", "--weights", tiny.weights, "--backends", "opnvino")
    assert "only gcvit_xxtiny comes with weights" in command.refuses("export", "--model", "gcvit_base")
    assert "checkpoint none.pth does not exist" in command.refuses("export", "--weights", "none.pth")


@pytest.mark.parametrize("threads", [0, -1])
def test_export_refuses_no_threads(threads: int, command: Command, tiny: Tiny) -> None:
    argv = ["export", "--weights", tiny.weights, "--backends", "onnx", "--threads", threads, "-o", "out"]
    assert f"threads must be at least 1, got {threads}" in command.refuses(*argv)


def test_export_refuses_a_network_that_images_cannot_be_given_to(command: Command, tmp_path: Path) -> None:
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64, in_chans=1)
    save_checkpoint(model, describe_model(model), tmp_path / "grey.safetensors", half=False)
    said = command.refuses("export", "--weights", str(tmp_path / "grey.safetensors"), "-o", str(tmp_path / "grey"))
    assert "the model takes 1 channel, and images are read as RGB" in said
