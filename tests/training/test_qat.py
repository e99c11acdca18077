"""`gcvit-edge quantize --recipe int8_qat`: it learns, resumes to the bit, in one process or in two, from the command to the bundle."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import launcher
from tiny import CLASSES, Tiny, make_tiny
from torch import Tensor, nn
from training_checks import assert_same, interrupt_after

from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.bundle.manifest import sha256
from gcvit_edge.cli import main
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import RMSNorm, deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.pipeline import quantize as quantize_bundle
from gcvit_edge.plan import Job, plan
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.learned import learnable
from gcvit_edge.quantization.scheme import Rounding, quantize
from gcvit_edge.recipe import parse_recipe
from gcvit_edge.training.images import LabelledImages, Samples
from gcvit_edge.training.loop import fit, make_accelerator
from gcvit_edge.training.qat import FineTuning, fine_tune, groups, saved_in_cache
from gcvit_edge.training.settings import QatSettings

RECIPE = """\
name: tiny_qat
description: limits that a tiny network keeps
backends: [openvino]
calibration: {images: 24}
limits: {max_drop: 50, min_agreement: 0.5}
qat: {epochs: 2, batch_size: 8, micro_batch: 4, augmentation: {crop_scale: [0.7, 1.0]}}
"""
ROUNDING: Rounding = frozenset({"linear", "conv"}), Arithmetic(activations="int8", linear_output=True)
Tune = Callable[..., tuple[Calibrated, dict[str, Any]]]


def network_inputs(data: LabelledImages) -> Tensor:
    return torch.stack([Samples(data)[index][0] for index in range(len(data))])


def settings(**changes: Any) -> QatSettings:
    mild = {"augmentation": {"crop_scale": [0.7, 1.0]}, "batch_size": 8, "micro_batch": 4, "epochs": 2, "distillation": {}}
    return QatSettings.model_validate(mild | changes)


@pytest.fixture
def model(small_model: Callable[..., GCViT]) -> GCViT:
    return small_model().eval()


@pytest.fixture
def calibrated(model: GCViT, colours: LabelledImages) -> Calibrated:
    """With ranges of a quarter of what was seen: there is much to learn."""
    recipe = parse_recipe(RECIPE, "tiny")
    good = calibrate(model, recipe, lambda: iter(network_inputs(colours)[:, None].numpy()))
    return replace(good, ranges={place: (low / 4, high / 4) for place, (low, high) in good.ranges.items()})


@pytest.fixture
def tune(model: GCViT, calibrated: Calibrated, colours: LabelledImages, tmp_path: Path) -> Tune:
    """Fine-tunes on the CPU with some settings; `state` is a file's name."""

    def tune(state: str = "state", *, resume: bool = False, **changes: Any) -> tuple[Calibrated, dict[str, Any]]:
        job = FineTuning(settings(**changes), colours, make_accelerator("cpu"), tmp_path / state, resume)
        return fine_tune(model, calibrated, [ROUNDING], job, Steps())

    return tune


def noise(result: Calibrated, model: GCViT, images: Tensor) -> float:
    """SQNR of what is deployed, in dB against float."""
    deployed = quantize(result.network, *ROUNDING, result.ranges)
    with torch.no_grad():
        return sqnr_db(deployed(images).numpy(), model(images).numpy())


def test_a_run_waits_in_the_cache_if_there_is_one(
    model: GCViT, colours: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = FineTuning(settings(), colours, make_accelerator("cpu"), tmp_path / "state", resume=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    saved = saved_in_cache(model, job, ["onnx"])
    assert (saved.state.is_relative_to(tmp_path / "cache"), saved.resume) == (True, False)
    saved.state.touch()
    assert saved_in_cache(model, job, ["onnx"]).resume
    assert saved_in_cache(model, job, ["onnx", "openvino"]).state != saved.state
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert saved_in_cache(model, job, ["onnx"]) == job


# what is learned


def test_the_loss_falls_and_the_result_is_nearer_to_float(
    tune: Tune, calibrated: Calibrated, model: GCViT, colours: LabelledImages
) -> None:
    result, report = tune(epochs=8, learning_rate=1e-3, range_learning_rate=1e-1, ema_decay=0.9, distillation={"weight": 1.0})
    losses = [epoch["loss"] for epoch in report["epochs"]]
    assert losses[-1] < 0.3 * losses[0]
    images = network_inputs(colours)
    assert noise(result, model, images) > noise(calibrated, model, images) + 6
    assert (report["images"], report["processes"], report["skipped_images"]) == (40, 1, [])
    assert report["settings"]["epochs"] == 8
    assert report["seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in report["epochs"]), abs=0.1)


def test_ranges_alone_learn_too(tune: Tune, calibrated: Calibrated, model: GCViT, colours: LabelledImages) -> None:
    result, _ = tune(epochs=8, learning_rate=1e-30, range_learning_rate=0.1, ema_decay=0.9)
    for name, value in calibrated.network.state_dict().items():
        torch.testing.assert_close(result.network.state_dict()[name], value, rtol=0, atol=1e-20)
    images = network_inputs(colours)
    assert noise(result, model, images) > noise(calibrated, model, images) + 3


def test_weights_alone_learn_too(tune: Tune, calibrated: Calibrated) -> None:
    result, _ = tune(learning_rate=1e-3, range_learning_rate=1e-30)
    assert all(result.ranges[place] == pytest.approx((min(low, 0), max(high, 0)), rel=1e-6)
               for place, (low, high) in calibrated.ranges.items() if result.ranges[place] != (low, high))  # fmt: skip
    before = calibrated.network.state_dict()
    changed = {name for name, value in result.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {"conv1.weight", "head.bias", "stages.0.blocks.0.fc1.weight", "stages.1.downsample.reduction.weight"} <= changed
    norms = {f"{name}.weight" for name, module in calibrated.network.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) > 10
    assert not norms & changed
    assert not any(name.endswith((".value", "gain")) for name in changed)  # constants and factors


def test_labels_alone_need_no_teacher(tune: Tune) -> None:
    _, report = tune(epochs=6, learning_rate=1e-3, range_learning_rate=5e-2, distillation=None)
    assert report["epochs"][-1]["loss"] < report["epochs"][0]["loss"]


def test_the_average_holds_ranges_too(calibrated: Calibrated, model: GCViT, colours: LabelledImages, tmp_path: Path) -> None:
    """The average of the logarithms, with the decay of weights: what `AveragedModel` gives for the last of two steps."""
    chosen = settings(epochs=1, batch_size=20, micro_batch=20, range_learning_rate=5e-2, ema_decay=0.9, warmup=0)
    student = learnable(calibrated, [ROUNDING])
    name = "stages.0.blocks.0.fc1.input.logarithms"
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda *_: seen.append(student.get_parameter(name).detach().clone()))
    trained, _ = fit(
        student, colours, chosen, make_accelerator("cpu"), state=tmp_path / "state", teacher=deploy(model), groups=groups(student, chosen)
    )
    first, last = seen[1], student.get_parameter(name).detach()
    assert not torch.equal(first, last)
    torch.testing.assert_close(trained.get_parameter(name).detach(), first + (1 - 2 / 11) * (last - first))


def test_ranges_have_their_own_learning_rate(calibrated: Calibrated) -> None:
    student = learnable(calibrated, [ROUNDING])
    chosen = settings(weight_decay=0.1)
    found = groups(student, chosen)
    listed = [id(parameter) for group in found for parameter in group["params"]]
    assert sorted(listed) == sorted({id(parameter) for parameter in student.parameters()})
    assert (found[-1]["lr"], found[-1]["weight_decay"]) == (chosen.range_learning_rate, 0)
    assert all(parameter.shape == (2,) for parameter in found[-1]["params"])
    assert found[0]["weight_decay"] == 0.1
    assert all("lr" not in group for group in found[:-1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(tune: Tune, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.training.loop.SAVE_SECONDS", 0)  # every step
    whole, report = tune("whole", precision=precision)

    def interrupted(*arguments: Any) -> nn.Module:
        student = learnable(*arguments)
        interrupt_after(student, 2 * 7 + 1)  # in the middle of the eighth of ten steps, the third of the second epoch
        return student

    with monkeypatch.context() as patch:
        patch.setattr("gcvit_edge.training.qat.learnable", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune("parted", precision=precision)
    assert torch.load(tmp_path / "parted", weights_only=True)["content"]["step"] == 7
    parted, again = tune("parted", precision=precision, resume=True)
    assert_same(torch.load(tmp_path / "parted", weights_only=True), torch.load(tmp_path / "whole", weights_only=True))
    assert_same(parted.network.state_dict(), whole.network.state_dict())
    assert parted.ranges == whole.ranges
    assert [epoch["loss"] for epoch in again["epochs"]] == [epoch["loss"] for epoch in report["epochs"]]
    with pytest.raises(UserError, match=r"is of another run: settings\.range_learning_rate was 0\.001, is 0\.002"):
        tune("parted", precision=precision, range_learning_rate=2e-3, resume=True)


def test_a_run_goes_on_with_its_own_teacher(
    tune: Tune, small_model: Callable[..., GCViT], calibrated: Calibrated, colours: LabelledImages, tmp_path: Path
) -> None:
    tune()
    other = small_model().eval()
    with torch.no_grad():
        other.head.fc.bias.add_(1)  # type: ignore[union-attr, operator]
    job = FineTuning(settings(), colours, make_accelerator("cpu"), tmp_path / "state", True)
    with pytest.raises(UserError, match="is of another run: teacher was "):
        fine_tune(other, calibrated, [ROUNDING], job, Steps())


def test_without_a_teacher_a_run_goes_on_from_its_own_weights(
    tune: Tune, small_model: Callable[..., GCViT], calibrated: Calibrated, colours: LabelledImages, tmp_path: Path
) -> None:
    tune(distillation=None)
    other = small_model().eval()
    with torch.no_grad():
        other.head.fc.bias.add_(1)  # type: ignore[union-attr, operator]
    job = FineTuning(settings(distillation=None), colours, make_accelerator("cpu"), tmp_path / "state", True)
    with pytest.raises(UserError, match=r"is of another run: origin\.weights was "):
        fine_tune(other, calibrated, [ROUNDING], job, Steps())


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
