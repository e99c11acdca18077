"""The float job: a GC ViT trained on a folder of images, from random weights or from a checkpoint."""

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gcvit_edge.data import (
    ImageFolder,
    Labels,
    Preprocessing,
    check_apart,
    check_empty,
    class_indices,
    default_preprocessing,
    find_images,
    has_all_classes,
)
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import wilson_interval
from gcvit_edge.model.checkpoint import Checkpoint, config_of, load_weights, read_checkpoint, save_checkpoint, variant_of
from gcvit_edge.model.create import TIMM_CROP_PCT
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import ModelInfo, Origin, config_dict
from gcvit_edge.model.variants import GCViTConfig, check_takes_rgb, variant_config
from gcvit_edge.progress import Steps
from gcvit_edge.training.devices import device_name, make_accelerator, with_precision
from gcvit_edge.training.images import LabelledImages, readable
from gcvit_edge.training.loop import fit, weights_digest
from gcvit_edge.training.settings import TrainSettings, micro_batches, steps_per_epoch
from gcvit_edge.training.state import check_state, state_beside

if TYPE_CHECKING:
    from accelerate import Accelerator

RANDOM_WEIGHTS = "random weights"
OWN_LICENCE = "not stated (trained from random weights: the licence is its owner's to give)"


@dataclass(frozen=True)
class TrainJob:
    """A checked request to train. origin: the shape and the weights that it starts from. new_head: the checkpoint's was for
    other classes. state: where an interrupted run waits."""

    model: GCViT
    info: ModelInfo
    settings: TrainSettings
    data: LabelledImages
    evaluation: LabelledImages | None
    origin: dict[str, Any]
    new_head: bool
    accelerator: "Accelerator"
    output: Path
    state: Path
    resume: bool


def plan_training(
    data: str | Path,
    output: str | Path,
    *,
    eval: str | Path | None = None,
    model: str | None = None,
    weights: str | Path | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    freeze_stages: int = 0,
    settings: TrainSettings | None = None,
    device: str = "auto",
    licence: str | None = None,
    resume: bool = False,
    force: bool = False,
) -> TrainJob:
    """Checks a request to train a GC ViT in float.

    data, eval: folders (or .zip) of images, one sub-folder a class. output: the .safetensors to write, in our layout. model:
    variant; default, that of the weights, else gcvit_xxtiny. weights: a checkpoint or "hf-hub:ID" to start from (None: random);
    if its classes are not those of the images, it gets a new head. labels: class names in the order of the logits; default, the
    checkpoint's if they fit, else the folders. image_size: pixels, one side; windows scale with it, position biases are interpolated.
    drop_path: stochastic depth. freeze_stages: how many of the four stages, the stem with them, keep their weights. device:
    "auto", "cpu" or "cuda". licence: of the result; default, that of `weights`. resume: continue an interrupted run.

    Raises:
        UserError: anything that is wrong with the input, before any long step.
    """
    settings = settings or TrainSettings()  # type: ignore[call-arg]
    output = Path(output)
    state = state_beside(output)
    _check_output(output, state, resume, force)
    if settings.distillation is not None:
        raise UserError("the settings have a section `distillation`, but training of a float model has no teacher; remove it")
    if not 0 <= freeze_stages <= 4:
        raise UserError(f"freeze_stages must be 0 to 4, the stages of GC ViT, got {freeze_stages}")
    if eval is not None:
        check_apart("--data", Path(data), Path(eval), "trained on says nothing")
    images = find_images(Path(data), "training")
    evaluation = None if eval is None else find_images(Path(eval), "evaluation")
    checkpoint = None if weights is None else read_checkpoint(str(weights))
    labels = _choose_labels(labels, checkpoint, images)
    classes = class_indices(images, labels)
    steps_per_epoch(len(images.files), settings)
    config = _config(checkpoint, model, len(labels.names), image_size, preprocessing, drop_path)
    check_takes_rgb(config)
    if preprocessing is None:
        preprocessing = _choose_preprocessing(checkpoint, config.img_size)
    elif preprocessing.size != config.img_size:
        raise UserError(f"the preprocessing makes {preprocessing.size} images, the model takes {config.img_size}; make the two agree")
    evaluated = None if evaluation is None else LabelledImages(evaluation, class_indices(evaluation, labels), preprocessing)
    accelerator = make_accelerator(device)
    settings = with_precision(settings, accelerator)
    micro_batches(settings, accelerator.num_processes)
    torch.manual_seed(settings.seed)
    network = GCViT(config)
    start_from = None if checkpoint is None else _with_classes(checkpoint, network, labels)
    if start_from is not None:
        load_weights(network, start_from, str(weights))
    freeze(network, freeze_stages)
    epochs = f"{settings.epochs} epoch{'' if settings.epochs == 1 else 's'}"
    start = RANDOM_WEIGHTS if checkpoint is None else checkpoint.origin.source
    info = ModelInfo(
        name=variant_of(config) or "gcvit_custom",
        config=config_dict(replace(config, drop_path=0.0)),  # training's alone
        labels=labels,
        preprocessing=preprocessing,
        origin=Origin(
            source=f"gcvit-edge train: {len(images.files)} images, {epochs}, from {start}",
            layout="gcvit-edge",
            licence=licence or (OWN_LICENCE if checkpoint is None else checkpoint.origin.licence),
        ),
    )
    origin = {"config": config_dict(config), "checkpoint": None if checkpoint is None else weights_digest(checkpoint.state)}
    trained_on = LabelledImages(images, classes, preprocessing)
    new_head = start_from is not checkpoint
    return TrainJob(network, info, settings, trained_on, evaluated, origin, new_head, accelerator, output, state, resume)


def run_training(job: TrainJob, steps: Steps) -> dict[str, Any]:
    """Trains, writes the checkpoint and gives back the report, in every process; the main one alone writes.

    The result is the average of the weights at the end (EMA): nothing is chosen by the evaluation images.

    Raises:
        UserError: more than 5 % of the images do not decode, or the saved run is of another request.
        CheckFailed: loss or weights are not finite, or the run cannot be saved.
    """
    main = job.accelerator.is_main_process
    if main and not job.resume:
        job.state.unlink(missing_ok=True)
    data, skipped = readable(job.data, "check training images", job.accelerator, steps)
    evaluation, skipped_too = (
        (None, []) if job.evaluation is None else readable(job.evaluation, "check evaluation images", job.accelerator, steps)
    )
    trained, history = fit(
        job.model, data, job.settings, job.accelerator, state=job.state, resume=job.resume, evaluation=evaluation, origin=job.origin,
        steps=steps,
    )  # fmt: skip
    if main:
        assert isinstance(trained, GCViT)  # an average has the type of its model
        _write(trained.cpu(), job)
    job.accelerator.end_training()
    report: dict[str, Any] = {
        "file": str(job.output),
        "model": job.info.name,
        "classes": len(job.info.labels.names),
        "images": len(data),
        "skipped_images": [*skipped, *skipped_too],
        "settings": job.settings.model_dump(mode="json"),
        "processes": job.accelerator.num_processes,
        "device": device_name(job.accelerator),
        "system": platform.platform(),
        "epochs": [asdict(epoch) for epoch in history],
    }
    if evaluation is not None and history[-1].evaluation is not None:
        top1, count = history[-1].evaluation, len(evaluation)
        report |= {"evaluation_images": count, "top1": top1, "top1_ci95": list(wilson_interval(round(top1 * count), count))}
    return report


def _write(model: GCViT, job: TrainJob) -> None:
    """The checkpoint; then the saved run is of no more use."""
    try:
        save_checkpoint(model, job.info, job.output, half=False)
    except OSError as error:
        raise CheckFailed(
            f"cannot write {job.output}: {error.strerror}; the run is saved, so see to that (is there room?) and give --resume"
        ) from error
    job.state.unlink()


def freeze(model: GCViT, stages: int) -> None:
    """Keeps the weights of the stem and of the first `stages` stages as they are; with 0, nothing."""
    frozen = [model.stem, *model.stages[:stages]] if stages else []
    for module in frozen:
        module.requires_grad_(False)


def _check_output(output: Path, state: Path, resume: bool, force: bool) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"--output must end in .safetensors, got {output.name}")
    if not output.parent.is_dir():
        raise UserError(f"the folder {output.parent} of --output does not exist; make it first")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give --output FILE.safetensors")
    if not force and output.exists():
        raise UserError(f"{output} exists; give --force to replace it, or another --output")
    check_state(state, resume, force)


def _choose_labels(labels: Labels | None, checkpoint: Checkpoint | None, images: ImageFolder) -> Labels:
    """As given; else those of the checkpoint, if the images have just these classes; else the names of the folders."""
    known = checkpoint and checkpoint.labels
    if labels is None and known is not None and has_all_classes(images, known):
        labels = known
    if labels is None:
        check_empty(images)
        labels = Labels.of(sorted(set(images.classes)))
    if len(labels.names) < 2:
        raise UserError(
            f"{images.root} has images of {len(labels.names)} class, {', '.join(labels.names)}; training needs at least two class folders, "
            "in the folder or .zip that is given and not deeper"
        )
    return labels


def _config(
    checkpoint: Checkpoint | None,
    name: str | None,
    classes: int,
    image_size: int | None,
    preprocessing: Preprocessing | None,
    drop_path: float,
) -> GCViTConfig:
    """The shape to train."""
    if checkpoint is None:
        config = variant_config(name or "gcvit_xxtiny")
    else:
        config = replace(config_of(checkpoint, name, preprocessing and preprocessing.size), se_multiple=checkpoint.config.se_multiple)
    if image_size is not None:
        config = replace(config, img_size=(image_size, image_size))
    return replace(config, num_classes=classes, drop_path=drop_path)


def _choose_preprocessing(checkpoint: Checkpoint | None, size: tuple[int, int]) -> Preprocessing:
    """That of the checkpoint, with its crop at another size; else timm's."""
    found = None if checkpoint is None else checkpoint.preprocessing
    if found is None:
        return default_preprocessing(size, TIMM_CROP_PCT)
    return found.model_copy(update={"size": size, "resize": round(found.resize * max(size) / max(found.size))})


def _with_classes(checkpoint: Checkpoint, fresh: GCViT, labels: Labels) -> Checkpoint:
    """The checkpoint with the head of `fresh` in the place of one for other classes; names of the same class folders may differ."""
    known = checkpoint.labels or labels
    if checkpoint.config.num_classes == len(labels.names) and (known.folders == labels.folders or known.names == labels.names):
        return checkpoint
    body = {key: value for key, value in checkpoint.state.items() if not key.startswith("head.")}
    head = {key: value for key, value in fresh.state_dict().items() if key.startswith("head.")}
    return replace(checkpoint, state=body | head, config=replace(checkpoint.config, num_classes=len(labels.names)))
