"""`gcvit-edge train`: from folders to a checkpoint that every other verb takes, in one process and in two."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launcher
from safetensors.torch import load_file
from tiny import CLASSES, Tiny, make_tiny
from torch import Tensor

from gcvit_edge.cli import main
from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import create_model, describe_model, load_model
from gcvit_edge.plan import plan
from gcvit_edge.progress import Steps
from gcvit_edge.training.images import Samples
from gcvit_edge.training.job import TrainJob, freeze, plan_training, run_training
from gcvit_edge.training.loop import fit
from gcvit_edge.training.settings import TrainSettings

SHORT = ["--batch-size", "8", "--micro-batch", "4", "--epochs", "2", "--drop-path", "0.1", "--image-size", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that the command writes, in a process of its own with one thread, and its report."""
    output = tmp_path_factory.mktemp("trained") / "mine.safetensors"
    done = train_command(tiny, "-o", output)
    assert done.returncode == 0, done.stderr
    assert "done epoch 2 of 2: loss " in done.stderr
    return output, json.loads(done.stdout)


def train_command(tiny: Tiny, *options: object, launcher: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "gcvit_edge", "train", "--json", *requested(tiny), *SHORT, *options]
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def requested(tiny: Tiny) -> list[object]:
    return ["--data", tiny.calib, "--eval", tiny.evaluation, "--weights", tiny.weights, "--device", "cpu"]


def job(tiny: Tiny, output: Path, **changes: Any) -> TrainJob:
    """The request of `trained`, and other ones."""
    settings = TrainSettings(batch_size=8, micro_batch=4, epochs=2)
    options = {"eval": tiny.evaluation, "weights": tiny.weights, "image_size": 32, "drop_path": 0.1, "settings": settings, "device": "cpu"}
    return plan_training(changes.pop("data", tiny.calib), output, **options | changes)


def images(job: TrainJob) -> Tensor:
    assert job.evaluation is not None
    samples = Samples(job.evaluation)
    return torch.stack([samples[index][0] for index in range(len(samples))])


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


# the checkpoint


def test_the_report(trained: tuple[Path, dict[str, Any]]) -> None:
    output, report = trained
    assert (report["file"], report["model"], report["classes"], report["images"]) == (str(output), "gcvit_custom", 4, 24)
    assert (report["evaluation_images"], report["processes"], report["skipped_images"]) == (40, 1, [])
    assert report["settings"]["learning_rate"] == TrainSettings().learning_rate
    assert len(report["epochs"]) == 2
    assert report["top1"] == report["epochs"][-1]["evaluation"] > 0.9
    assert report["top1_ci95"][0] < report["top1"]
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_checkpoint_is_what_was_trained(trained: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    output, report = trained
    again = job(tiny, tmp_path / "again.safetensors")
    network, history = fit(again.model, again.data, again.settings, again.accelerator, state=again.state)
    assert [epoch.loss for epoch in history] == [epoch["loss"] for epoch in report["epochs"]]
    loaded, info = load_model(str(output))
    created = create_model(weights=output, dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), img_size=32)
    with torch.inference_mode():
        expected = network.eval()(images(again))
        assert torch.equal(loaded(images(again)), expected)
        assert torch.equal(created(images(again)), expected)
    assert info.labels == Labels.of(CLASSES)
    assert info.preprocessing == Preprocessing(size=(32, 32), resize=36)  # that of the weights, at the other size
    assert info.config["drop_path"] == 0.0
    assert info.origin.source == "gcvit-edge train: 24 images, 2 epochs, from made in memory"
    assert info.origin.licence.startswith("unknown")


def test_the_checkpoint_is_ready_to_quantize(trained: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    checked = plan("int8_ptq", weights=trained[0], calib=tiny.calib, eval=tiny.evaluation, output=tmp_path / "bundle")
    assert checked.info.labels.names == CLASSES
    assert checked.model.config.img_size == (32, 32)


def test_two_processes_give_what_one_gives(trained: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "two.safetensors"
    done = train_command(tiny, "-o", output, launcher=launcher(2))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # of one process alone
    assert report["processes"] == 2
    for two, one in zip(report["epochs"], trained[1]["epochs"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert (two["accuracy"], two["evaluation"]) == (one["accuracy"], one["evaluation"])
    ours, theirs = load_file(output), load_file(trained[0])
    assert set(ours) == set(theirs)
    for name, value in theirs.items():  # to the bit: a mean of two gradients has no order
        assert torch.equal(ours[name], value), name


# interruption


def test_an_interrupted_run_is_kept_and_resumed(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state, output = tmp_path / "mine.safetensors.run", tmp_path / "mine.safetensors"
    options = [*map(str, requested(tiny)), *SHORT, "--epochs", "10000", "-o", str(output)]
    command = subprocess.Popen([sys.executable, "-m", "gcvit_edge", "train", *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    _, shown = command.communicate(timeout=60)
    assert command.returncode == 130
    assert shown.endswith(f"interrupted; the run is saved in {state}: continue it with --resume\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".partial") == [state.name]
    assert main(["train", *options]) == 2
    assert "is an interrupted run; give --resume to continue it, or --force to start again" in capfd.readouterr().err
    assert main(["train", *options, "--epochs", "2", "--resume"]) == 2
    assert "is of another run: settings.epochs was 10000, is 2" in capfd.readouterr().err
    assert main(["train", *options, "--epochs", "2", "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_only_the_run_that_was_started_is_resumed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.safetensors"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gcvit_edge.training.job._write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(job(tiny, output), Steps())
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        other.head.fc.bias.add_(1)  # type: ignore[union-attr, operator]
    save_checkpoint(other, describe_model(other, Labels.of(CLASSES)), tmp_path / "other.safetensors", half=False)
    for changes, differs in (
        ({"drop_path": 0.2}, r"origin\.config\.drop_path was 0\.1, is 0\.2"),
        ({"weights": tmp_path / "other.safetensors"}, r"origin\.checkpoint was [0-9a-f]{64}, is [0-9a-f]{64}"),
    ):
        with pytest.raises(UserError, match=f"is of another run: {differs}; resume what was started"):
            run_training(job(tiny, output, resume=True, **changes), Steps())
    assert run_training(job(tiny, output, resume=True), Steps())["file"] == str(output)


# what the model starts from


def test_the_same_classes_keep_the_head(tiny: Tiny, tmp_path: Path) -> None:
    planned = job(tiny, tmp_path / "a.safetensors", image_size=None)
    weights = load_file(tiny.weights)
    assert all(torch.equal(value, weights[name]) for name, value in planned.model.state_dict().items())
    assert planned.info.labels == Labels.of(CLASSES)
    assert not planned.new_head


def test_other_classes_keep_the_body_and_get_a_new_head(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "three"
    for name in CLASSES[1:]:
        shutil.copytree(tiny.calib / name, data / name)
    planned = job(tiny, tmp_path / "a.safetensors", data=data, eval=None, image_size=None)
    weights = load_file(tiny.weights)
    body = without_head(planned.model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in body.items())
    assert planned.info.labels.names == CLASSES[1:]
    assert planned.info.config["num_classes"] == 3
    assert planned.new_head
    assert not planned.model.head.fc.bias.any()  # type: ignore[union-attr]
    (data / CLASSES[1]).rename(data / "cyan")
    shutil.copytree(tiny.calib / CLASSES[0], data / CLASSES[0])
    planned = job(tiny, tmp_path / "a.safetensors", data=data, eval=None)
    assert planned.info.labels.names == ("blue", "cyan", "red", "yellow")
    assert not torch.equal(planned.model.head.fc.weight, weights["head.fc.weight"])  # type: ignore[union-attr]


def test_other_names_of_the_same_classes_keep_the_head(tiny: Tiny, tmp_path: Path) -> None:
    labels = Labels(names=("azul", "verde", "rojo", "amarillo"), folders=CLASSES)
    planned = job(tiny, tmp_path / "a.safetensors", labels=labels)
    assert torch.equal(planned.model.head.fc.weight, load_file(tiny.weights)["head.fc.weight"])  # type: ignore[union-attr]
    assert planned.info.labels == labels


def test_weights_of_a_named_variant_keep_their_input_size(tiny: Tiny, tmp_path: Path) -> None:
    model = create_model("gcvit_xxtiny", num_classes=4, img_size=64)
    save_checkpoint(model, describe_model(model), tmp_path / "small.safetensors", half=True)
    planned = job(tiny, tmp_path / "a.safetensors", model="gcvit_xxtiny", weights=tmp_path / "small.safetensors", image_size=None)
    assert planned.info.preprocessing.size == planned.model.config.img_size == (64, 64)


def test_networks_of_other_channels_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64, in_chans=1)
    save_checkpoint(model, describe_model(model), tmp_path / "grey.safetensors", half=True)
    with pytest.raises(UserError, match="the model takes 1 channel, and images are read as RGB"):
        job(tiny, tmp_path / "a.safetensors", weights=tmp_path / "grey.safetensors")


def test_random_weights_follow_the_seed(tiny: Tiny, tmp_path: Path) -> None:
    first, same, other = (
        job(tiny, tmp_path / "a.safetensors", weights=None, settings=TrainSettings(batch_size=8, seed=seed), licence="MIT")
        for seed in (1, 1, 2)
    )
    assert first.info.name == "gcvit_xxtiny"
    assert (first.info.origin.licence, first.info.config["num_classes"]) == ("MIT", 4)
    weights = [planned.model.head.fc.weight for planned in (first, same, other)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.model.stages[-1].blocks[-1].drop_path.rate == pytest.approx(0.1)  # type: ignore[union-attr, index]


def test_frozen_stages_keep_their_weights(tiny: Tiny, tmp_path: Path) -> None:
    planned = job(tiny, tmp_path / "a.safetensors", freeze_stages=3, settings=TrainSettings(batch_size=8, epochs=1))
    before = {name: value.clone() for name, value in planned.model.state_dict().items()}
    network, _ = fit(planned.model, planned.data, planned.settings, planned.accelerator, state=planned.state)
    changed = {
        name.split(".")[0] + name.split(".")[1] * name.startswith("stages")
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"stages3", "head"}


def test_freezing_nothing_and_all(make_model: Callable[..., Any]) -> None:
    model = make_model()
    freeze(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze(model, 4)
    assert {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad} == {"head"}


def test_images_that_do_not_decode_are_left_out(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.evaluation, data)
    (data / "red" / "0.png").write_bytes((data / "red" / "0.png").read_bytes()[:2000])
    options = ["train", "--data", data, "--weights", tiny.weights, *SHORT, "--epochs", "1", "--json", "-o", tmp_path / "a.safetensors"]
    assert main([str(option) for option in options]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["images"], report["skipped_images"]) == (39, ["red/0.png"])
    assert "top1" not in report
    for number in range(1, 4):
        (data / "blue" / f"{number}.png").write_bytes(b"")
    assert main([str(option) for option in [*options, "--force"]]) == 2
    assert "4 of 40 images in" in capfd.readouterr().err


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none"}, "training folder none does not exist"),
        ({"eval": "none"}, "evaluation folder none does not exist"),
        ({"weights": "none.safetensors"}, r"checkpoint none\.safetensors does not exist"),
        ({"model": "gcvit_huge"}, "unknown model 'gcvit_huge'; did you mean"),
        ({"model": "gcvit_tiny"}, "is not a gcvit_tiny; its shape is "),
        ({"image_size": 50}, r"img_size \(50, 50\) is not a multiple of 32 pixels"),
        ({"drop_path": 1.5}, "drop_path is a probability below 1"),
        ({"freeze_stages": 5}, "freeze_stages must be 0 to 4"),
        ({"settings": TrainSettings(batch_size=25)}, "24 training images do not make one batch of 25"),
        ({"settings": TrainSettings(batch_size=8, micro_batch=3)}, "batch_size 8 is no multiple of 3"),
        ({"settings": TrainSettings(distillation={})}, "has no teacher"),  # type: ignore[arg-type]
        ({"labels": Labels.of(["a", "b"])}, "folders that are no class of the model"),
        ({"preprocessing": Preprocessing()}, r"the preprocessing makes \(224, 224\) images, the model takes \(32, 32\)"),
        ({"resume": True}, "nothing to resume"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        job(tiny, tmp_path / "a.safetensors", **changes)
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output must end in \.safetensors, got a\.pth"):
        job(tiny, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"the folder .*none of --output does not exist"):
        job(tiny, tmp_path / "none" / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(UserError, match=r"b\.safetensors is a folder; give --output FILE\.safetensors"):
        job(tiny, tmp_path / "b.safetensors", force=True)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="exists; give --force to replace it"):
        job(tiny, tmp_path / "a.safetensors")


def test_training_images_do_not_evaluate(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data and --eval are both .*; accuracy on images that were trained on says nothing"):
        job(tiny, tmp_path / "a.safetensors", eval=tiny.calib)
    with pytest.raises(UserError, match=r"--data and --eval share images, .*; accuracy on"):
        job(tiny, tmp_path / "a.safetensors", eval=tiny.calib / CLASSES[0])


def test_one_class_is_nothing_to_learn(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.calib / "red", tmp_path / "data" / "red")
    with pytest.raises(UserError, match=r"has images of 1 class, .*; training needs at least two class folders"):
        job(tiny, tmp_path / "a.safetensors", data=tmp_path / "data", eval=None)


def test_a_class_without_images_is_not_lost(tiny: Tiny, tmp_path: Path) -> None:
    data = shutil.copytree(tiny.calib, tmp_path / "data")
    (data / "purple").mkdir()
    (data / "purple" / "1.heic").touch()
    with pytest.raises(UserError, match=r"data has folders without an image \(\.avif, .*\): purple; .* remove them, or give them images"):
        job(tiny, tmp_path / "a.safetensors", data=data, weights=None)
    assert job(tiny, tmp_path / "a.safetensors", data=data).info.labels.names == CLASSES  # those of the checkpoint


def test_classes_that_were_not_trained(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        shutil.copytree(tiny.calib / name, tmp_path / "data" / name)
    with pytest.raises(UserError, match="2 folders that are no class of the model: green, yellow"):
        job(tiny, tmp_path / "a.safetensors", data=tmp_path / "data", settings=TrainSettings(batch_size=4))
