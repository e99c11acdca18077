"""Checking a request to quantize, before any long step: all bad input is refused here, and nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.backends import load_backend
from gcvit_edge.bundle.output import check_output
from gcvit_edge.cpus import resolve_threads
from gcvit_edge.data import ImageFolder, Labels, Preprocessing, check_apart, check_depth, class_indices, find_images
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import images_that_show, images_to_judge
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.model.variants import check_takes_rgb, variant_config
from gcvit_edge.recipe import MIN_CALIBRATION_IMAGES, Limits, Recipe, Search, parse_recipe, recipe_text
from gcvit_edge.resources import resource_dir
from gcvit_edge.schema import validate

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.training.qat import FineTuning

SAMPLE_MODEL = "gcvit_xxtiny"
SAMPLE_WEIGHTS = "gcvit_xxtiny.fashion_mnist.safetensors"


@dataclass(frozen=True)
class Job:
    """A checked request: everything that can be wrong with the input has been looked at, and nothing was written.

    ranking: images by which layers are ranked, which do not calibrate where --calib has enough others. held_out: images that
    neither calibrate nor evaluate, by which a search judges.
    """

    recipe: Recipe
    recipe_text: str
    model: "GCViT"
    info: ModelInfo
    calibration: ImageFolder
    ranking: ImageFolder
    held_out: ImageFolder | None
    evaluation: ImageFolder
    classes: NDArray[np.int64]
    backends: tuple[str, ...]
    output: Path
    threads: int
    force: bool
    with_float: bool
    tuning: "FineTuning | None"


def plan(
    recipe: str = "int8_ptq",
    model: "str | GCViT | None" = None,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
    calib: str | Path | None = None,
    eval: str | Path | None = None,
    train: str | Path | None = None,
    eval_images: int | None = None,
    backends: Sequence[str] | None = None,
    output: str | Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    resume: bool = False,
    force: bool = False,
    with_float: bool = False,
    zip: bool = False,
    max_drop: float | None = None,
    searching: bool = True,
) -> Job:
    """Checks a request to quantize; the arguments are those of `quantize`. searching: hold images out if the recipe has a search.

    Raises:
        UserError: anything that is wrong with the input, before any long step.
    """
    text = recipe_text(recipe)
    parsed = parse_recipe(text, recipe)
    if max_drop is not None:
        parsed = parsed.model_copy(update={"limits": validate(Limits, parsed.limits.model_dump() | {"max_drop": max_drop}, "--max-drop")})
    if isinstance(backends, str):
        raise UserError(f"backends must be a list, got {backends!r}; write [{backends!r}]")
    names = tuple(dict.fromkeys(backends or parsed.backends))
    for name in names:
        able = load_backend(name).PRECISIONS
        if parsed.precision not in able:
            raise UserError(
                f"recipe {parsed.name} wants {parsed.precision}, which backend {name} cannot make (it makes "
                f"{', '.join(sorted(able))}); give --backends without it"
            )
    threads = resolve_threads(threads)
    sample = weights is None and (model is None or isinstance(model, str))
    if sample and parsed.search:  # which wants more images than calibration does
        calib = calib or resource_dir("calib") / "train.zip"
    calib, eval = _image_folders(sample, calib, eval)
    check_apart("--calib", calib, eval, "quantized by says too little")
    train = _training_folder(parsed, sample, train, eval, device, resume)
    calibration, evaluation = find_images(calib, "calibration"), find_images(eval, "evaluation")
    network, info = _resolve_model(model, weights, num_classes, labels, preprocessing, calibration, evaluation)
    check_takes_rgb(network.config)
    check_depth(calibration, info.labels)  # else its images would not be spread over the classes
    if eval_images is not None:
        evaluation = evaluation.some(eval_images, parsed.calibration.seed)
    classes = class_indices(evaluation, info.labels)
    if len(classes) < (needed := images_to_judge(network.config.num_classes)):
        raise UserError(
            f"{eval} has {len(classes)} evaluation images; to tell a model of {network.config.num_classes} classes from guessing takes "
            f"{needed}, and to see what INT8 costs a thousand; give more"
        )
    if len(calibration.files) < MIN_CALIBRATION_IMAGES:
        raise UserError(
            f"{calib} has {len(calibration.files)} calibration images; give at least {MIN_CALIBRATION_IMAGES}, "
            f"better the {parsed.calibration.images} that the recipe wants"
        )
    target = bundle_path(output, f"{info.name}.{parsed.name}", zip)
    check_output(target, force)
    selected = calibration.select(parsed.calibration.images, parsed.calibration.seed)
    rest = calibration.without(selected)
    held_out = _held_out(parsed, rest, info.labels) if parsed.search and searching else None
    ranked_by = (parsed.search or Search()).ranked_by  # type: ignore[call-arg]
    ranking = (rest if len(rest.files) >= ranked_by else selected).select(ranked_by, parsed.calibration.seed)
    if parsed.keep_float:
        _check_keep_float(network, parsed)
    tuning = None
    if parsed.qat is not None and train is not None:
        from gcvit_edge.training.qat import plan_fine_tuning

        tuning = plan_fine_tuning(
            parsed, selected, train, info.labels, info.preprocessing, target, device=device or "auto", resume=resume, force=force
        )
    return Job(
        parsed, text, network, info, selected, ranking, held_out, evaluation, classes, names, target, threads, force, with_float, tuning
    )


def bundle_path(output: str | Path | None, name: str, zip: bool) -> Path:
    """Where a bundle goes: `output`, or `name` in the current folder; with `zip`, ending in .zip.

    Raises:
        UserError: it is the root of the file system.
    """
    path = Path(output or name)
    path = path.resolve() if path.name in ("", "..") else path  # of "." and "..", which have no name to put files beside
    if not path.name:
        raise UserError(f"--output {output} is the root of the file system; choose a folder in it")
    return path.with_name(path.name + ".zip") if zip and path.suffix != ".zip" else path


def sample_weights(model: str | None) -> Path:
    """The embedded checkpoint.

    Raises:
        UserError: `model` is a variant without embedded weights.
    """
    if model not in (None, SAMPLE_MODEL):
        raise UserError(f"only {SAMPLE_MODEL} comes with weights; give --weights FILE or hf-hub:ID for {model}")
    return resource_dir("calib") / SAMPLE_WEIGHTS


def _image_folders(sample: bool, calib: str | Path | None, eval: str | Path | None) -> tuple[Path, Path]:
    if sample:
        return Path(calib or resource_dir("calib") / "calib.zip"), Path(eval or resource_dir("calib") / "eval.zip")
    if calib is None or eval is None:
        missing = "--calib" if calib is None else "--eval"
        raise UserError(
            f"a model of your own needs {missing} DIR: a folder (or .zip) of your images, one sub-folder a class; "
            "calibration sets the INT8 ranges, evaluation measures what they cost"
        )
    return Path(calib), Path(eval)


def _training_folder(recipe: Recipe, sample: bool, train: str | Path | None, eval: Path, device: str | None, resume: bool) -> Path | None:
    """The images to fine-tune on, if the recipe does that."""
    if recipe.qat is None:
        given = {"--train": train is not None, "--device": device is not None, "--resume": resume}
        if any(given.values()):
            flag = next(flag for flag in given if given[flag])
            raise UserError(
                f"{flag} is for recipes that fine-tune, such as int8_qat, but {recipe.name} has no section `qat`; "
                "leave it out, or choose another --recipe"
            )
        return None
    if train is None:
        if not sample:
            raise UserError(
                "a model of your own needs --train DIR: a folder (or .zip) of your images to fine-tune on, one sub-folder "
                "a class, and other images than --eval; some thousand are plenty"
            )
        train = resource_dir("calib") / "train.zip"
    check_apart("--train", Path(train), eval, "trained on says nothing")
    return Path(train)


def _held_out(recipe: Recipe, rest: ImageFolder, labels: Labels) -> ImageFolder:
    """The images that judge which layers stay float."""
    assert recipe.search is not None
    limit = recipe.limits.max_drop
    if limit <= 0:
        raise UserError(
            f"{recipe.name} searches for a drop of at most {limit} points, but no number of images can show that none is "
            "lost; give a --max-drop over 0"
        )
    held_out = rest.select(recipe.search.images, recipe.calibration.seed)
    check_held_out(recipe, held_out, len(held_out.files))
    class_indices(held_out, labels)
    return held_out


def check_held_out(recipe: Recipe, held_out: ImageFolder, count: int) -> None:
    """That `count` of the held-out images can show a drop within the limit of a recipe that searches.

    Raises:
        UserError: they are too few.
    """
    assert recipe.search is not None
    needed = images_that_show(recipe.limits.max_drop)
    if count < needed:
        unreadable = f" (of {len(held_out.files)}, of which the others do not decode)" if count < len(held_out.files) else ""
        raise UserError(
            f"{held_out.root} leaves {count} images that do not calibrate{unreadable}, and {recipe.name} looks at {recipe.search.images} "
            f"at most; to show a drop of at most {recipe.limits.max_drop} points with 95 % confidence takes {needed}, better three times "
            "as many. Give more images in --calib, a larger `search.images`, or a larger --max-drop"
        )


def _check_keep_float(network: "GCViT", recipe: Recipe) -> None:
    from gcvit_edge.model.deploy import deploy
    from gcvit_edge.quantization.keep import kept_layers
    from gcvit_edge.quantization.scheme import roundable_layers

    deployed = deploy(network)
    rounded = roundable_layers(deployed, recipe.operators, recipe.precision)
    for pattern in recipe.keep_float:
        if not kept_layers(deployed, [pattern]) & rounded:
            raise UserError(
                f"keep_float: {pattern!r} is nothing that {', '.join(recipe.operators)} in {recipe.precision} would round; leave it out"
            )


def _resolve_model(
    model: "str | GCViT | None",
    weights: str | Path | None,
    num_classes: int | None,
    labels: Labels | None,
    preprocessing: Preprocessing | None,
    calibration: ImageFolder,
    evaluation: ImageFolder,
) -> "tuple[GCViT, ModelInfo]":
    from gcvit_edge.model.create import describe_model, load_model
    from gcvit_edge.model.gcvit import GCViT

    if isinstance(model, str):
        variant_config(model)  # an unknown name is reported before anything else
    by_folder = partial(_labels_of_folders, (evaluation, calibration))
    if model is not None and not isinstance(model, str):
        if weights is not None or num_classes is not None:
            raise UserError("weights and num_classes are for models by name; the network that was given has its own, so leave them out")
        if not isinstance(model, GCViT):
            raise UserError(
                f"the network that was given is a {type(model).__name__}, expected one of gcvit_edge.create_model; of another "
                "implementation save the state_dict, and give the file as weights"
            )
        if model.head is None:
            raise UserError("the network has no classifier head; quantization needs one, so create it with num_classes > 0")
        _check_weights(model)
        return model, describe_model(model, labels or by_folder(model.config.num_classes), preprocessing)
    if weights is None:
        weights = sample_weights(model)
    return load_model(str(weights), model, num_classes=num_classes, labels=labels, preprocessing=preprocessing, unnamed=by_folder)


def _labels_of_folders(given: Sequence[ImageFolder], classes: int) -> Labels | None:
    """Where there are no names anywhere: the folders in their order, as torchvision's ImageFolder has it, of the first of these that has
    as many as there are classes.

    Raises:
        UserError: the folders are numbers, whose own order is another; or two have as many, but not the same.
    """
    numbers = [str(index) for index in range(classes)]
    named: dict[tuple[str, ...], ImageFolder] = {}
    for images in given:
        folders = sorted(set(images.classes))
        if folders != numbers and folders == sorted(numbers):
            raise UserError(
                f"the folders of {images.root} are the numbers of classes, and nothing says whether class 2 of the network is folder 2 "
                f"or, as for torchvision's ImageFolder, folder {folders[2]}; give --labels FILE with a folder a line, in the order of "
                "the logits"
            )
        if len(folders) == classes:
            named.setdefault(tuple(folders), images)
    if len(named) > 1:
        said = "; ".join(f"{images.root}: {', '.join(folders[:5])}{', ...' * (classes > 5)}" for folders, images in named.items())
        raise UserError(
            f"the checkpoint does not name its {classes} classes, and folders have other names here than there ({said}); "
            "rename them, or give --labels FILE with the names in the order of the logits"
        )
    return Labels.of(next(iter(named))) if named else None


def _check_weights(network: "GCViT") -> None:
    """Those of a network that was given are as they are in a checkpoint that was read."""
    for name, value in network.state_dict().items():
        if str(value.device) != "cpu" or str(value.dtype) != "torch.float32":
            raise UserError(f"the network has {name} in {value.dtype} on {value.device}; quantization starts from .float().cpu()")
        if not value.isfinite().all():
            raise UserError(f"the network holds nan or inf in {name}: the run that made it diverged")


def describe_plan(job: Job) -> dict[str, Any]:
    """What a job would do, as JSON."""
    return {
        "model": job.info.name,
        "recipe": job.recipe.name,
        "weights": job.info.origin.source,
        "licence": job.info.origin.licence,
        "classes": len(job.info.labels.names),
        "first_classes": list(job.info.labels.names[:5]),
        "preprocessing": job.info.preprocessing.model_dump(),
        "calibration_images": len(job.calibration.files),
        **({"held_out_images": len(job.held_out.files)} if job.held_out else {}),
        "evaluation_images": len(job.evaluation.files),
        **({"training_images": len(job.tuning.data), "device": str(job.tuning.accelerator.device)} if job.tuning else {}),
        "backends": list(job.backends),
        "max_drop": job.recipe.limits.max_drop,
        "output": str(job.output),
        "threads": job.threads,
    }
