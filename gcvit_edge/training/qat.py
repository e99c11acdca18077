"""Quantization-aware fine-tuning: what calibration gave goes on to learn from the float model, in the arithmetic it is deployed in."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gcvit_edge.cache import cache_file, digest, sources
from gcvit_edge.data import ImageFolder, Labels, Preprocessing, class_indices, decode_images, find_images, inputs
from gcvit_edge.measurement.accuracy import check_baseline, images_to_judge
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import Calibrated
from gcvit_edge.quantization.learned import Range, learnable, learned
from gcvit_edge.quantization.scheme import Rounding
from gcvit_edge.recipe import Recipe
from gcvit_edge.training.devices import device_name, make_accelerator, with_precision
from gcvit_edge.training.images import LabelledImages, readable
from gcvit_edge.training.loop import fit, weights_digest
from gcvit_edge.training.optimization import Groups, parameter_groups
from gcvit_edge.training.settings import QatSettings, micro_batches, steps_per_epoch
from gcvit_edge.training.state import check_state, state_beside

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKED_IMAGES = 256
_CALIBRATION = {"operators", "precision", "centering", "smoothing", "equalization", "calibration"}  # sections of a recipe


@dataclass(frozen=True)
class FineTuning:
    """A checked request to fine-tune. state: where an interrupted run waits. or_anew: whether one that is of something else, or damaged,
    is no matter. calibration: what decides the ranges that it starts from."""

    settings: QatSettings
    data: LabelledImages
    accelerator: "Accelerator"
    state: Path
    resume: bool
    calibration: dict[str, Any] = field(default_factory=dict)
    or_anew: bool = False


def plan_fine_tuning(
    recipe: Recipe,
    calibration: ImageFolder,
    train: Path,
    labels: Labels,
    preprocessing: Preprocessing,
    output: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
) -> FineTuning:
    """Checks a request to fine-tune, of a recipe that does.

    calibration: the images that set the ranges. train: folder (or .zip) of images, one sub-folder a class. output: the bundle; the run
    is saved beside it. device: "auto", "cpu" or "cuda".

    Raises:
        UserError: anything that is wrong with the input, before any long step.
    """
    settings = recipe.qat
    assert settings is not None
    state = state_beside(output)
    check_state(state, resume, force)
    images = find_images(train, "training")
    if settings.images is not None:
        images = images.select(settings.images, settings.seed)
    data = LabelledImages(images, class_indices(images, labels), preprocessing)
    steps_per_epoch(len(data), settings)
    accelerator = make_accelerator(device)
    settings = with_precision(settings, accelerator)
    micro_batches(settings, accelerator.num_processes)
    calibrated_on = digest(sorted(calibration.listing()))
    decided_by = recipe.model_dump(mode="json", include=_CALIBRATION) | {"calibration_images": calibrated_on}
    return FineTuning(settings, data, accelerator, state, resume, decided_by)


def saved_in_cache(model: GCViT, job: FineTuning, backends: Sequence[str]) -> FineTuning:
    """The same for a command that makes no bundle to save the run beside: it is saved in the user's cache, named by all that it follows
    from, and goes on from there. Where nothing can be written, an interrupted run starts anew."""
    requested = json.dumps([job.settings.model_dump(mode="json"), job.data.identity(), job.calibration, *backends])
    state = cache_file(digest([weights_digest(model.state_dict()), requested, sources()])).with_suffix(".run")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return job
    return replace(job, state=state, resume=state.is_file(), or_anew=True) if os.access(state.parent, os.W_OK) else job


def check_teacher(model: GCViT, job: FineTuning, scratch: Path, steps: Steps) -> None:
    """Labels in another order than the float model's logits are found before the training, not after it: on some of its images
    float must be right more often than by chance. A run that is resumed has been checked.

    scratch: a folder for the decoded images.

    Raises:
        CheckFailed: float is no better than chance.
        UserError: more than 5 % of the images do not decode.
    """
    images = job.data.images.select(_CHECKED_IMAGES, job.settings.seed)
    if job.resume or len(images.files) < images_to_judge(model.config.num_classes):
        return
    with steps.step("check float on training images", 2 * len(images.files)) as advance:
        pixels = decode_images(images, job.data.preprocessing, scratch / "teacher.npy", advance)
        answers = []
        for image in inputs(pixels, job.data.preprocessing):
            with torch.no_grad():
                answers.append(model(torch.from_numpy(image)).numpy())
            advance()
    classes = dict(zip(job.data.images.files, job.data.classes, strict=True))
    check_baseline(np.concatenate(answers), np.array([classes[images.files[kept]] for kept in pixels.kept]))


def fine_tune(
    model: GCViT, calibrated: Calibrated, runtimes: Sequence[Rounding], job: FineTuning, steps: Steps
) -> tuple[Calibrated, dict[str, Any]]:
    """What `calibrated` has learned on the training images, for all of these runtimes, and a report; the same in every process.

    The teacher is `model`, in float. The result is the average of weights and ranges at the end (EMA). The run stays saved: what is
    made of it may fail.

    Raises:
        UserError: more than 5 % of the images do not decode, or the saved run is of another request.
        CheckFailed: loss or weights are not finite, or the run cannot be saved.
    """
    settings, accelerator = job.settings, job.accelerator
    if accelerator.is_main_process and not job.resume:
        job.state.unlink(missing_ok=True)
    data, skipped = readable(job.data, "check training images", accelerator, steps)
    student = learnable(calibrated, runtimes)
    teacher = None if settings.distillation is None else rewrite(deploy(model), Form())
    # not what calibration gave, whose last bits are another CPU's own
    origin = job.calibration | ({"weights": weights_digest(model.state_dict())} if teacher is None else {})
    trained, history = fit(
        student, data, settings, accelerator, state=job.state, resume=job.resume, or_anew=job.or_anew, teacher=teacher,
        groups=groups(student, settings), origin=origin, steps=steps,
    )  # fmt: skip
    accelerator.end_training()
    report = {
        "images": len(data),
        "skipped_images": skipped,
        "settings": settings.model_dump(mode="json"),
        "processes": accelerator.num_processes,
        "device": device_name(accelerator),
        "epochs": [asdict(epoch) for epoch in history],
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
    }
    return learned(calibrated, trained.cpu()), report


def groups(student: nn.Module, settings: QatSettings) -> Groups:
    """AdamW's parameter groups: ranges have a learning rate of their own, and no weight decay."""
    ranges = [module.logarithms for module in student.modules() if isinstance(module, Range)]
    own = {id(parameter) for parameter in ranges}
    others = [
        group | {"params": [parameter for parameter in group["params"] if id(parameter) not in own]}
        for group in parameter_groups(student, settings.weight_decay)
    ]
    return [*others, {"params": ranges, "lr": settings.range_learning_rate, "weight_decay": 0.0}]
