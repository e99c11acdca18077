"""Fine-tuning in INT8: weights and ranges learn, and a run resumes to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_checks import assert_same, interrupt_after

from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import RMSNorm, deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.learned import learnable
from gcvit_edge.quantization.scheme import Rounding, quantize
from gcvit_edge.recipe import Recipe
from gcvit_edge.training.devices import make_accelerator
from gcvit_edge.training.images import LabelledImages, Samples
from gcvit_edge.training.loop import fit
from gcvit_edge.training.qat import FineTuning, fine_tune, groups, saved_in_cache
from gcvit_edge.training.settings import QatSettings

ROUNDING = Rounding(frozenset({"linear", "conv"}), Arithmetic(activations="int8", linear_output=True))
Tune = Callable[..., tuple[Calibrated, dict[str, Any]]]


def network_inputs(data: LabelledImages) -> Tensor:
    return torch.stack([Samples(data)[index][0] for index in range(len(data))])


def settings(**changes: Any) -> QatSettings:
    mild = {"augmentation": {"crop_scale": [0.7, 1.0]}, "batch_size": 8, "micro_batch": 4, "epochs": 2, "distillation": {}}
    return QatSettings.model_validate(mild | changes)


@pytest.fixture
def model(small_model: Callable[..., GCViT]) -> GCViT:
    return small_model().eval()


@pytest.fixture(scope="module")
def calibrated(small_model: Callable[..., GCViT], colours: LabelledImages) -> Calibrated:
    """With ranges of a quarter of what was seen: there is much to learn."""
    recipe = Recipe(name="ranges", description="of 24 images", calibration={"images": 24})
    good = calibrate(small_model().eval(), recipe, lambda: iter(network_inputs(colours)[:, None].numpy()))
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
    deployed = quantize(result.network, ROUNDING.operators, ROUNDING.arithmetic, result.ranges)
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


@pytest.mark.slow
def test_ranges_alone_learn_too(tune: Tune, calibrated: Calibrated, model: GCViT, colours: LabelledImages) -> None:
    result, _ = tune(epochs=8, learning_rate=1e-30, range_learning_rate=0.1, ema_decay=0.9)
    for name, value in calibrated.network.state_dict().items():
        torch.testing.assert_close(result.network.state_dict()[name], value, rtol=0, atol=1e-20)
    images = network_inputs(colours)
    assert noise(result, model, images) > noise(calibrated, model, images) + 3


@pytest.mark.slow
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


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
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
