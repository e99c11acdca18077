"""`gcvit-edge quantize --recipe int8_qat`: in one process or in two, resumed, from the command to the bundle; and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import launcher
from tiny import CLASSES, Tiny, make_tiny

from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.bundle.manifest import sha256
from gcvit_edge.cli import main
from gcvit_edge.errors import UserError
from gcvit_edge.pipeline import quantize as quantize_bundle
from gcvit_edge.plan import Job, plan
from gcvit_edge.recipe import parse_recipe

RECIPE = """\
name: tiny_qat
description: limits that a tiny network keeps
backends: [openvino]
calibration: {images: 24}
limits: {max_drop: 50, min_agreement: 0.5}
qat: {epochs: 2, batch_size: 8, micro_batch: 4, augmentation: {crop_scale: [0.7, 1.0]}}
"""

# the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = make_tiny(tmp_path_factory.mktemp("tiny"))
    made.recipe.write_text(RECIPE, encoding="utf-8")
    return made


def requested(tiny: Tiny) -> list[str]:
    options = ["--recipe", tiny.recipe, "--weights", tiny.weights, "--calib", tiny.calib, "--eval", tiny.evaluation]
    return [str(option) for option in [*options, "--train", tiny.calib, "--device", "cpu", "--threads", 1]]


def command(tiny: Tiny, output: Path, launcher: tuple[object, ...] = ()) -> dict[str, Any]:
    """The report that the command prints, in a process of its own with one thread."""
    line = [sys.executable, *map(str, launcher), "-m", "gcvit_edge", "quantize", "--json", *requested(tiny), "-o", str(output)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done epoch 2 of 2: loss ") == 1
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, Any]]:
    output = tmp_path_factory.mktemp("made") / "bundle"
    report = command(tiny, output)
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]  # the saved run is gone
    return open_bundle(output), report


def hashes(bundle: Bundle) -> list[str]:
    """Of the files of the INT8 artifact."""
    return [sha256(file) for file in bundle.artifact("openvino", "int8").files]


def test_the_bundle_and_its_report(made: tuple[Bundle, dict[str, Any]], tiny: Tiny) -> None:
    bundle, report = made
    training = report["training"]
    assert bundle.report["training"] == training
    assert (training["images"], training["processes"], len(training["epochs"])) == (24, 1, 2)
    assert training["settings"]["distillation"] == {"temperature": 1.0, "weight": 0.5}
    assert all(parity.passed for parity in bundle.verify().values())


@pytest.mark.slow  # training/test_job.py has two of float
def test_two_processes_give_what_one_gives(made: tuple[Bundle, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    report = command(tiny, tmp_path / "two", launcher(2))  # of one process alone
    assert report["training"]["processes"] == 2
    for two, one in zip(report["training"]["epochs"], made[1]["training"]["epochs"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6, abs=1e-9)
        assert two["accuracy"] == one["accuracy"]
    assert hashes(open_bundle(tmp_path / "two")) == hashes(made[0])  # to the bit: a mean of two gradients has no order


def test_what_fails_after_training_is_resumed(
    made: tuple[Bundle, dict[str, Any]], tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
    output, state = tmp_path / "bundle", tmp_path / "bundle.run"
    line = ["quantize", *requested(tiny), "-o", str(output)]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gcvit_edge.pipeline._make", interrupted)
        assert main(line) == 130
    assert capfd.readouterr().err.endswith(f"interrupted; the run is saved in {state}: continue it with --resume\n")
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    averaged = torch.load(state, weights_only=True)["content"]["average"]
    assert any(value.any() for name, value in averaged.items() if name.endswith(".logarithms"))  # of what ranges have learned
    assert main(line) == 2
    tiny.recipe.write_text(RECIPE.replace("{images: 24}", "{images: 24, seed: 1}"), encoding="utf-8")
    assert main([*line, "--resume"]) == 2
    assert "is of another run: origin.calibration.seed was 0, is 1; resume what was started" in capfd.readouterr().err
    tiny.recipe.write_text(RECIPE, encoding="utf-8")
    assert main(line) == 2
    assert "is an interrupted run; give --resume to continue it, or --force to start again" in capfd.readouterr().err
    assert main([*line, "--resume", "--json"]) == 0
    captured = capfd.readouterr()
    assert "epoch" not in captured.err  # nothing is trained again
    assert [epoch["loss"] for epoch in json.loads(captured.out)["training"]["epochs"]] == [
        epoch["loss"] for epoch in made[1]["training"]["epochs"]
    ]
    assert hashes(open_bundle(output)) == hashes(made[0])
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_labels_in_another_order_are_found_before_the_training(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*CLASSES[1:], CLASSES[0]]))
    assert main(["quantize", *requested(tiny), "--labels", str(labels), "-o", str(tmp_path / "bundle")]) == 4
    said = capfd.readouterr().err
    assert "the float model's top-1 is 0.0% on 24 images, no better than guessing (25.0%)" in said
    assert "calibrate" not in said
    assert list(tmp_path.iterdir()) == [labels]


# requests


def planned(tiny: Tiny, output: Path, **changes: Any) -> Job:
    options = {"weights": tiny.weights, "calib": tiny.calib, "eval": tiny.evaluation, "train": tiny.calib, "device": "cpu"} | changes
    return plan(options.pop("recipe", str(tiny.recipe)), output=output, **options)


def test_images_are_chosen_evenly(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "fewer.yaml"
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 2, images: 12"), encoding="utf-8")
    job = planned(tiny, tmp_path / "bundle", recipe=str(recipe))
    assert job.tuning is not None
    assert np.bincount(job.tuning.data.classes).tolist() == [3] * len(CLASSES)
    whole = planned(tiny, tmp_path / "bundle").tuning
    assert whole is not None
    assert len(whole.data) == 24


def test_the_sample_has_images_to_train_on(tmp_path: Path) -> None:
    job = plan("int8_qat", output=tmp_path / "bundle", device="cpu")
    assert job.tuning is not None
    assert len(job.tuning.data) == 1000
    assert job.tuning.state == tmp_path / "bundle.run"
    assert plan("int8_ptq", output=tmp_path / "bundle").tuning is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, "a model of your own needs --train DIR"),
        ({"train": "none"}, "training folder none does not exist"),
        ({"recipe": "int8_ptq"}, "--train is for recipes that fine-tune, such as int8_qat, but int8_ptq has no section `qat`"),
        ({"recipe": "int8_ptq", "train": None}, "--device is for recipes that fine-tune"),
        ({"recipe": "int8_ptq", "train": None, "device": None, "resume": True}, "--resume is for recipes that fine-tune"),
        ({"resume": True}, r"nothing to resume: .*bundle\.run does not exist"),
    ],
)
def test_bad_requests_are_refused(changes: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        planned(tiny, tmp_path / "bundle", **changes)
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_is_not_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--train and --eval are both "):
        planned(tiny, tmp_path / "bundle", train=f"{tiny.evaluation}/../{tiny.evaluation.name}")


def test_images_of_other_classes(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.calib / "red", tmp_path / "train" / "cyan")
    with pytest.raises(UserError, match="1 folders that are no class of the model: cyan"):
        planned(tiny, tmp_path / "bundle", train=tmp_path / "train")


def test_too_few_images(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.calib / "red", tmp_path / "train" / "red")
    with pytest.raises(UserError, match="6 training images do not make one batch of 8"):
        planned(tiny, tmp_path / "bundle", train=tmp_path / "train")


def test_several_processes_are_for_the_command(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2
        is_main_process = True

    monkeypatch.setattr("gcvit_edge.training.qat.make_accelerator", lambda device: Two())
    with pytest.raises(UserError, match="several processes are for the command: accelerate launch"):
        quantize_bundle(str(tiny.recipe), weights=tiny.weights, calib=tiny.calib, eval=tiny.evaluation, train=tiny.calib,
                        output=tmp_path / "bundle")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_would_be_trained(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", *requested(tiny), "-o", str(tmp_path / "bundle"), "--dry-run", "--json"]) == 0
    described = json.loads(capfd.readouterr().out)
    assert (described["training_images"], described["device"]) == (24, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_section_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UserError, match=r"unknown key 'qat\.epoch'; did you mean 'epochs'\?"):
        parse_recipe(RECIPE.replace("epochs", "epoch"), "tiny")
    with pytest.raises(UserError, match="`qat` trains INT8, and the precision is w4a8"):
        parse_recipe(RECIPE + "precision: w4a8\n", "tiny")
