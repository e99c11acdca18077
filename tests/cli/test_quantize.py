"""quantize: exit codes, messages, JSON, and nothing written when something is wrong."""

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

import numpy as np
import pytest
import torch
from commands import GOLDEN, Command, own, without
from tiny import CALIBRATION_IMAGES, CLASSES, EVALUATION_IMAGES, Tiny
from torch import Tensor, nn

from gcvit_edge import create_model
from gcvit_edge.cli.quantize import for_another_cpu
from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.machine import this_machine
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.plan import describe_plan, plan
from gcvit_edge.recipe import parse_recipe, recipe_text


def test_dry_run_on_the_embedded_sample(command: Command, tmp_path: Path) -> None:
    outcome = command("quantize", "--dry-run", "--json")
    assert outcome.code == 0
    planned = outcome.json
    assert (planned["model"], planned["recipe"], planned["classes"]) == ("gcvit_xxtiny", "int8_ptq", 10)
    assert (planned["calibration_images"], planned["evaluation_images"]) == (128, 2000)
    assert planned["backends"] == ["executorch", "openvino", "onnx"]
    assert planned["preprocessing"]["size"] == [224, 224]
    assert planned["licence"] == "Apache-2.0"
    assert planned["output"] == "gcvit_xxtiny.int8_ptq"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--backends", "openvino", "onnx"], ["--backends", "openvino", "--backends", "onnx"]])
def test_backends_in_one_flag_or_several(flags: list[str], command: Command) -> None:
    assert command("quantize", "--dry-run", "--json", *flags).json["backends"] == ["openvino", "onnx"]


def test_dry_run_on_own_model(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    outcome = command("quantize", *own(tiny), "--dry-run", "--zip", "--threads", 1)
    assert outcome.code == 0
    assert "dry run: nothing was written" in outcome.out
    assert f"calibration_images: {CALIBRATION_IMAGES}" in outcome.out
    assert "output: gcvit_custom.tiny.zip" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_some_of_the_evaluation_images(command: Command, tiny: Tiny) -> None:
    assert command("quantize", *own(tiny), "--eval-images", 10, "--dry-run", "--json").json["evaluation_images"] == 10
    assert "eval_images must be at least 1, got 0" in command.refuses("quantize", *own(tiny), "--eval-images", 0)


def test_fewer_evaluation_images_than_classes(tiny: Tiny, tmp_path: Path) -> None:
    """The class names are those of all folders nevertheless."""
    names = [f"class{number:02}" for number in range(12)]
    for name in names:
        shutil.copytree(tiny.evaluation / "red", tmp_path / "eval" / name)
    model = create_model(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=12, img_size=64)
    job = plan(str(tiny.recipe), model, calib=tiny.calib, eval=tmp_path / "eval", eval_images=5)
    assert (len(job.evaluation.files), list(job.info.labels.names)) == (5, names)


def test_quantize(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    bundle, done = made
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # standard output is the JSON alone
    assert report.pop("bundle") == "bundle"
    assert report == json.loads((bundle / "report.json").read_text())
    assert report["images"] == EVALUATION_IMAGES
    assert report["artifacts"][0]["threads"] == 1
    assert "done calibrate" in done.stderr
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert {path.name for path in bundle.iterdir()} >= {"model.float.onnx", "model.int8.onnx"}


@pytest.mark.parametrize(
    ("recipe", "backends", "features", "lines"),
    [
        ("int8_ptq", ("openvino", "onnx"), ("avx2",), 1), ("int8_ptq", ("onnx",), ("avx2",), 0),
        ("int8_ptq_avx2", ("openvino",), ("avx2",), 0), ("fp16", ("openvino",), ("avx2",), 0),
        ("int8_ptq", ("openvino",), ("avx2", "avx512_vnni"), 0),
    ],
)  # fmt: skip
def test_a_recipe_for_another_cpu(
    recipe: str, backends: tuple[str, ...], features: tuple[str, ...], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = this_machine().model_copy(update={"features": features})
    monkeypatch.setattr("gcvit_edge.measurement.machine.this_machine", lambda: machine)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert len(for_another_cpu(parse_recipe(recipe_text(recipe), recipe), backends)) == lines


def test_broken_limits_are_exit_3(command: Command, tiny: Tiny, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.pipeline import Made

    def made_before(job: object, calibrated: object, work: Path, stage: Path, steps: object) -> list[Made]:
        before = Path(shutil.copy(bundle / "model.float.onnx", work))
        after = Path(shutil.copy(bundle / "model.int8.onnx", stage))
        return [Made(Artifact("onnx", "float", before, (before,)), Artifact("onnx", "int8", after, (after,)))]

    monkeypatch.setattr("gcvit_edge.pipeline._make", made_before)  # measuring and packing are real
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("name: strict\ndescription: impossible\ncalibration: {images: 16}\nlimits: {max_drop: -100, min_agreement: 1}\n")
    outcome = command("quantize", *without(own(tiny), "--recipe"), "--recipe", recipe, "-o", "out", "--json")
    assert outcome.code == 3, outcome.err
    assert "error: onnx: top-1 drop over -100.0 points or agreement below 100.0%, the limits of strict" in outcome.err
    assert outcome.json["artifacts"][0]["within_limits"] is False
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["within_limits"] is False


def test_quantize_refuses_names(command: Command, tiny: Tiny) -> None:
    assert "unknown model 'gcvit_xxtinny'; did you mean 'gcvit_xxtiny'?" in command.refuses("quantize", "--model", "gcvit_xxtinny")
    assert "only gcvit_xxtiny comes with weights; give --weights" in command.refuses("quantize", "--model", "gcvit_tiny")
    assert "unknown recipe 'int8_pt'; did you mean 'int8_ptq'?" in command.refuses("quantize", "--recipe", "int8_pt")
    assert "unknown backend 'onxx'; did you mean 'onnx'?" in command.refuses("quantize", "--backends", "openvino", "onxx")
    assert "recipe file none.yaml does not exist" in command.refuses("quantize", "--recipe", "none.yaml")
    assert "threads must be at least 1, got 0" in command.refuses("quantize", *own(tiny), "--threads", 0)


def test_quantize_refuses_a_broken_recipe(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndescription: x\ncalibraton: {images: 5}\n")
    message = command.refuses("quantize", *without(own(tiny), "--recipe"), "--recipe", "mine.yaml")
    assert "unknown key 'calibraton'; did you mean 'calibration'?" in message
    (tmp_path / "mine.yaml").write_text('name: mine\ndescription: x\nkeep_float: [head, "*.softmax"]\n')
    message = command.refuses("quantize", *without(own(tiny), "--recipe"), "--recipe", "mine.yaml")
    assert "keep_float: '*.softmax' is nothing that linear, conv in int8 would round; leave it out" in message


def test_quantize_refuses_images(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    rest = without(own(tiny), "--calib")
    assert "a model of your own needs --calib DIR" in command.refuses("quantize", *rest)
    assert "needs --eval DIR" in command.refuses("quantize", *without(own(tiny), "--eval"))
    assert "calibration folder nowhere does not exist" in command.refuses("quantize", *rest, "--calib", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "calibration folder empty holds no image" in command.refuses("quantize", *rest, "--calib", "empty")
    shutil.copytree(tiny.calib, tmp_path / "few")
    for colour in CLASSES:
        for image in list((tmp_path / "few" / colour).iterdir())[3:]:
            image.unlink()
    message = command.refuses("quantize", *rest, "--calib", "few")
    assert "few has 12 calibration images; give at least 16, better the 24 that the recipe wants" in message


def test_quantize_refuses_to_evaluate_on_what_calibrates(command: Command, tiny: Tiny) -> None:
    message = command.refuses("quantize", *without(own(tiny), "--eval"), "--eval", tiny.calib)
    assert f"--calib and --eval are both {tiny.calib}; accuracy on images that were quantized by says too little" in message
    message = command.refuses("quantize", *without(own(tiny), "--calib"), "--calib", tiny.evaluation.parent)
    assert f"--calib and --eval share images, {tiny.evaluation.parent} and {tiny.evaluation}; accuracy on images" in message


def test_quantize_refuses_too_few_images_to_judge_by(command: Command, tiny: Tiny) -> None:
    message = command.refuses("quantize", *own(tiny), "--eval-images", "3")
    assert "has 3 evaluation images; to tell a model of 4 classes from guessing takes 4, and to see what INT8 costs a thousand" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda weight: weight.half(), r"the network has stem.conv1.weight in torch.float16 on cpu; .* starts from .float\(\).cpu\(\)"),
        (lambda weight: weight.to("meta"), "in torch.float32 on meta"),
        (lambda weight: weight / 0, "the network holds nan or inf in stem.conv1.weight: the run that made it diverged"),
    ],
)
def test_weights_in_memory_are_checked(changed: Callable[[Tensor], Tensor], message: str, tiny: Tiny) -> None:
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64)
    model.stem.conv1.weight = nn.Parameter(changed(model.stem.conv1.weight.detach()))
    with pytest.raises(UserError, match=message):
        plan(str(tiny.recipe), model, calib=tiny.calib, eval=tiny.evaluation)


def test_networks_of_others_and_lists_that_are_none(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"is a Sequential, expected one of gcvit_edge\.create_model; .* give the file as weights"):
        plan(str(tiny.recipe), torch.nn.Sequential(), calib=tiny.calib, eval=tiny.evaluation)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"backends must be a list, got 'onnx'; write \['onnx'\]"):
        plan(str(tiny.recipe), weights=tiny.weights, calib=tiny.calib, eval=tiny.evaluation, backends="onnx")


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ({"in_chans": 1}, {}, "the model takes 1 channel, and images are read as RGB"),
        ({"num_classes": 0}, {}, "the network has no classifier head"),
        ({}, {"num_classes": 4}, "weights and num_classes are for models by name"),
        ({}, {"weights": "none.pth"}, "weights and num_classes are for models by name"),
        ({}, {"labels": Labels.of("abc")}, "3 labels were given for 4 classes of made in memory"),
        ({}, {"preprocessing": Preprocessing()}, r"the preprocessing makes \(224, 224\) images, the model takes \(64, 64\)"),
    ],
)
def test_networks_in_memory_are_checked(shape: dict[str, Any], arguments: dict[str, Any], message: str, tiny: Tiny) -> None:
    small = {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 4, "img_size": 64}
    model = create_model(**small | shape)
    with pytest.raises(UserError, match=message):
        plan(str(tiny.recipe), model, calib=tiny.calib, eval=tiny.evaluation, **arguments)


def test_names_are_those_of_folders_where_there_are_no_others(tiny: Tiny, tmp_path: Path, make_model: Callable[..., GCViT]) -> None:
    """Class numbers are names too if they were given, and no other order of the same numbers; without, the order is anybody's guess."""
    for index in range(12):
        for name in ("calib", "val"):
            shutil.copytree(tiny.calib / CLASSES[index % len(CLASSES)], tmp_path / name / str(index))
    model, numbers = make_model(num_classes=12), Labels.of(map(str, range(12)))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    save_checkpoint(model, describe_model(model, numbers), tmp_path / "named.safetensors", half=False)
    given = {"calib": tmp_path / "calib", "eval": tmp_path / "val", "output": tmp_path / "out"}
    for weights, labels in [("plain.pth", numbers), ("named.safetensors", None)]:
        job = plan("int8_ptq", weights=tmp_path / weights, labels=labels, **given)
        assert job.info.labels == numbers
        assert {int(Path(file).parts[0]) for file, found in zip(job.evaluation.files, job.classes, strict=True) if found == 2} == {2}
    with pytest.raises(
        UserError, match="class 2 of the network is folder 2 or, as for torchvision's ImageFolder, folder 10; give --labels"
    ):
        plan("int8_ptq", weights=tmp_path / "plain.pth", **given)
    for name in ("calib", "val"):
        for index in range(12):
            (tmp_path / name / str(index)).rename(tmp_path / name / f"class {index}")
    shutil.rmtree(tmp_path / "val" / "class 3")  # of some classes there may be no images to evaluate
    job = plan("int8_ptq", weights=tmp_path / "plain.pth", **given)
    assert job.info.labels.names[:4] == ("class 0", "class 1", "class 10", "class 11")
    assert describe_plan(job)["first_classes"] == ["class 0", "class 1", "class 10", "class 11", "class 2"]
    shutil.copytree(tmp_path / "val" / "class 4", tmp_path / "val" / "class 3")
    (tmp_path / "calib" / "class 0").rename(tmp_path / "calib" / "class x")
    with pytest.raises(UserError, match=r"other names here than there \(.*val: class 0, class 1, .*; .*calib: class 1, .*; rename them"):
        plan("int8_ptq", weights=tmp_path / "plain.pth", **given)
    assert plan("int8_ptq", weights=tmp_path / "plain.pth", labels=job.info.labels, **given).info.labels == job.info.labels


def test_quantize_refuses_folders_that_are_no_classes(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.evaluation, tmp_path / "val")
    (tmp_path / "val" / "yellow").rename(tmp_path / "val" / "yelow")
    message = command.refuses("quantize", *without(own(tiny), "--eval"), "--eval", "val")
    assert "val has 1 folders that are no class of the model: yelow (did you mean 'yellow'?)" in message


@pytest.mark.parametrize(("count", "given"), [(3, "3 labels were given for 4 classes"), (5, "5 labels were given for 4 classes")])
def test_quantize_refuses_labels_of_another_number(count: int, given: str, command: Command, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"class {i}\n" for i in range(count)))
    assert given in command.refuses("quantize", *own(tiny), "--labels", "labels.txt")


def test_quantize_refuses_checkpoints(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    rest = without(own(tiny), "--weights")
    other = GOLDEN / "timm_plain.safetensors"
    message = command.refuses("quantize", *rest, "--weights", other, "--model", "gcvit_tiny")
    assert "timm_plain.safetensors is not a gcvit_tiny; its shape is {" in message
    whole = tiny.weights.read_bytes()
    for name, content in (("half.safetensors", whole[: len(whole) // 2]), ("half.pth", b"PK\x03\x04" + bytes(100)), ("no.pth", b"")):
        (tmp_path / name).write_bytes(content)
        message = command.refuses("quantize", *rest, "--weights", name)
        assert f"checkpoint {name} is truncated or no" in message
        assert "download it again" in message
    assert "checkpoint none.pth does not exist" in command.refuses("quantize", *rest, "--weights", "none.pth")
    assert "4 classes, but 7 were asked for" in command.refuses("quantize", *own(tiny), "--num-classes", 7)


def test_quantize_refuses_outputs(command: Command, tiny: Tiny, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    assert "mine exists and holds a bundle; give --force" in command.refuses("quantize", *own(tiny), "-o", "mine")
    assert "notes.txt exists; give another --output" in command.refuses("quantize", *own(tiny), "-o", "notes.txt")
    assert "photos exists and is not a bundle" in command.refuses("quantize", *own(tiny), "-o", "photos", "--force")
    assert "cannot write to notes.txt" in command.refuses("quantize", *own(tiny), "-o", "notes.txt/bundle")


def test_baseline_no_better_than_chance_is_exit_4(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcvit_edge import pipeline

    guesses = np.tile(np.eye(4, dtype=np.float32), (EVALUATION_IMAGES // 4, 1))
    monkeypatch.setattr(pipeline, "_make", lambda *_: [pipeline.Made(None, None)])  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "run_artifacts", lambda *_: [guesses, guesses])
    outcome = command("quantize", *own(tiny), "-o", "out", "--json")
    assert outcome.code == 4
    assert outcome.out == ""
    assert "the float model's top-1 is 25.0% on 40 images, no better than guessing (25.0%)" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_internal_error_is_exit_1_and_leaves_nothing(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.pipeline._make", lambda *_: 1 / 0)
    outcome = command("quantize", *own(tiny), "-o", "out")
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.err
    assert "internal error" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_exit_130_and_leaves_nothing(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gcvit_edge.pipeline._make", interrupted)
    outcome = command("quantize", *own(tiny), "-o", "out", "--json")
    assert outcome.code == 130
    assert outcome.out == ""
    assert "interrupted; nothing was written" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_exit_130_and_leaves_nothing(ending: signal.Signals, default_signals: None, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gcvit_edge", "quantize", *map(str, own(tiny)), "-o", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert process.stderr is not None
    seen = process.stderr.readline()  # the first finished step: the bundle is under way
    time.sleep(0.5)
    assert list(tmp_path.glob(".out.partial-*")), seen
    process.send_signal(ending)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted; nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []
