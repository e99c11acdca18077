"""The main job: checkpoint -> deploy form -> float and INT8 artifact of each backend -> measured -> bundle."""

import platform
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import INTEGER_ACTIVATIONS, Artifact
from gcvit_edge.backends import load_backend
from gcvit_edge.beside import FloatArtifacts
from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.bundle.manifest import GOLDEN_IMAGES, RecipeCopy
from gcvit_edge.bundle.output import staged_bundle
from gcvit_edge.bundle.pack import pack
from gcvit_edge.data import MAX_UNREADABLE, ImageFolder, Labels, Pixels, Preprocessing, class_indices, decode_images, inputs
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.lower import integer_operators, lower_quantized, roundings
from gcvit_edge.measurement.accuracy import Logits, check_baseline, compare, hits, sqnr_db
from gcvit_edge.measurement.machine import cpu_name
from gcvit_edge.measurement.parity import MIN_SQNR_DB
from gcvit_edge.plan import Job, check_held_out, plan
from gcvit_edge.progress import Steps
from gcvit_edge.search import HeldOut, search
from gcvit_edge.targets.local import TIMED_ROUNDS, Timing, run_artifacts, time_artifacts

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.quantization.calibrate import Calibrated

CHECKED_IMAGES = 16  # of the float artifacts that are not evaluated on all


@dataclass(frozen=True)
class Made:
    """What one backend made. search: how it was found which layers stay float, where the recipe wants that."""

    float: Artifact
    int8: Artifact
    search: dict[str, Any] | None = None


def quantize(
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
    steps: Steps | None = None,
) -> Bundle:
    """Quantizes a GC ViT for every backend, measures each artifact against float in its own runtime, and packs a bundle.

    recipe: name or YAML file. model: variant name, or a network from `create_model`; None recognises the weights. weights: a
    checkpoint file or "hf-hub:ID"; None with no network is the embedded sample. calib, eval, train: folders (or .zip) of
    images, one sub-folder a class; train, device ("auto", "cpu" or "cuda") and resume are for recipes that fine-tune. eval_images: how
    many of eval, spread evenly over the classes (None: all). backends: default, those of the recipe. output: the bundle to make.
    with_float: ship the float artifacts too. zip: one file instead of a folder. max_drop: in percentage points, instead of the recipe's
    limit. steps: where progress goes.

    Raises:
        UserError: bad input; nothing was written.
        CheckFailed: an artifact could not be made or does not do what it should; nothing was written.

    The bundle is returned even if it breaks the recipe's limits: see `bundle.manifest.within_limits`.
    """
    job = plan(
        recipe, model, weights=weights, num_classes=num_classes, labels=labels, preprocessing=preprocessing, calib=calib, eval=eval,
        train=train, eval_images=eval_images, backends=backends, output=output, threads=threads, device=device, resume=resume, force=force,
        with_float=with_float, zip=zip, max_drop=max_drop,
    )  # fmt: skip
    if job.tuning is not None and job.tuning.accelerator.num_processes > 1:
        raise UserError(
            "several processes are for the command: accelerate launch --multi_gpu -m gcvit_edge quantize ...; call quantize() in one"
        )
    bundle = run_job(job, steps or Steps())
    assert bundle is not None  # the only process is the main one
    return bundle


def run_job(job: Job, steps: Steps) -> Bundle | None:
    """Does what `plan` has checked; see `quantize`. Under `accelerate launch` the main process alone makes the bundle, after all have
    trained; the others get None."""
    if job.tuning is not None and not job.tuning.accelerator.is_main_process:
        with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as scratch:
            prepare(job, Path(scratch), steps)
        return None
    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as scratch, staged_bundle(job.output, job.force) as stage:
        work = Path(scratch)
        pixels = _decode(job.evaluation, job.info.preprocessing, work / "eval.npy", "read evaluation images", steps)
        calibrated, prepared = prepare(job, work, steps)
        made = _make(job, calibrated, work, stage, steps)
        report, answers = _measure(job, made, pixels, stage, steps)
        report |= prepared | {"skipped_images": [*prepared["skipped_images"], *pixels.skipped]}
        shipped = [artifact for each in made for artifact in ((each.float, each.int8) if job.with_float else (each.int8,))]
        with steps.step("pack"):
            golden = np.concatenate(list(inputs(pixels, job.info.preprocessing, GOLDEN_IMAGES)))
            recipe = RecipeCopy(name=job.recipe.name, text=job.recipe_text)
            pack(stage, job.info, {artifact: answers[artifact] for artifact in shipped}, golden, report, recipe)
    if job.tuning is not None:
        job.tuning.state.unlink(missing_ok=True)  # the saved run is of no more use
    return open_bundle(job.output)


def _decode(
    images: ImageFolder, preprocessing: Preprocessing, file: Path, name: str, steps: Steps, max_unreadable: float = MAX_UNREADABLE
) -> Pixels:
    with steps.step(name, len(images.files)) as advance:
        return decode_images(images, preprocessing, file, advance, max_unreadable)


def prepare(job: Job, work: Path, steps: Steps) -> "tuple[Calibrated, dict[str, Any]]":
    """Weights and ranges, once for all backends: calibrated, and fine-tuned if the recipe says so; and what the report says of it."""
    from gcvit_edge.quantization.calibrate import calibrate

    if job.tuning is not None:
        from gcvit_edge.training.qat import check_teacher

        check_teacher(job.model, job.tuning, work, steps)
    images = _decode(job.calibration, job.info.preprocessing, work / "calib.npy", "read calibration images", steps)
    runtimes = roundings(job.recipe, job.backends)
    with steps.step("calibrate"):
        calibrated = calibrate(job.model, job.recipe, lambda: inputs(images, job.info.preprocessing), runtimes)
    if job.tuning is None:
        return calibrated, {"skipped_images": images.skipped}
    from gcvit_edge.training.qat import fine_tune

    calibrated, training = fine_tune(job.model, calibrated, runtimes, job.tuning, steps)
    return calibrated, {"training": training, "skipped_images": [*images.skipped, *training.pop("skipped_images")]}


def _hold_out(job: Job, work: Path, steps: Steps) -> HeldOut | None:
    """The images of a search, if the recipe has one."""
    if job.held_out is None:
        return None
    pixels = _decode(job.held_out, job.info.preprocessing, work / "held_out.npy", "read held-out images", steps)
    check_held_out(job.recipe, job.held_out, len(pixels.kept))
    classes = class_indices(job.held_out, job.info.labels)[pixels.kept]
    return HeldOut(pixels, classes, job.info.preprocessing, ranking_images(job, work, steps))


def ranking_images(job: Job, work: Path, steps: Steps) -> list[NDArray[np.float32]]:
    """The images (1, C, H, W) by which layers are ranked."""
    pixels = _decode(job.ranking, job.info.preprocessing, work / "ranking.npy", "read images that rank", steps, max_unreadable=1)
    return list(inputs(pixels, job.info.preprocessing, len(pixels.kept)))


def _make(job: Job, calibrated: "Calibrated", work: Path, stage: Path, steps: Steps) -> list[Made]:
    """Float and quantized artifact of every backend."""
    held_out = _hold_out(job, work, steps)
    with closing(FloatArtifacts(job.model, job.info, job.backends, stage if job.with_float else work, work)) as beside:
        if held_out is not None:  # a search compares with float
            floats = _wait(beside, steps)
            return [_search(job, each, calibrated, held_out, work, stage, steps) for each in floats]
        quantized = []
        for name in job.backends:
            with steps.step(f"{name}: export {job.recipe.precision}"):
                quantized.append(lower_quantized(name, calibrated, job.info, job.recipe, stage))
        return [Made(*each) for each in zip(_wait(beside, steps), quantized, strict=True)]


def _wait(beside: FloatArtifacts, steps: Steps) -> list[Artifact]:
    with steps.step("export float"):
        return beside.wait()


def _search(job: Job, float_artifact: Artifact, calibrated: "Calibrated", held_out: HeldOut, work: Path, stage: Path, steps: Steps) -> Made:
    name = float_artifact.backend
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        artifact, report = search(
            name, calibrated, job.info, job.recipe, float_artifact, held_out, stage, Path(scratch), job.threads, steps
        )
    return Made(float_artifact, artifact, report)


def _measure(job: Job, made: list[Made], pixels: Pixels, stage: Path, steps: Steps) -> tuple[dict[str, Any], dict[Artifact, Logits]]:
    """The report: accuracy of every INT8 artifact against float on the same images, and the latency of all, interleaved. And the logits of
    all artifacts for the golden images, the first ones.

    The float logits come from the first backend's float artifact on all images; the other float artifacts are checked to
    give the same on some of them, which is all that float rounding leaves open.
    """
    classes = job.classes[pixels.kept]
    evaluated = [made[0].float, *(each.int8 for each in made)]
    with steps.step("evaluate", len(evaluated) * len(pixels.kept)) as advance:
        reference, *logits = run_artifacts(evaluated, pixels, job.info.preprocessing, advance)
    check_baseline(reference, classes)
    with steps.step("check float artifacts"):
        others = _check_floats([each.float for each in made], pixels, job.info.preprocessing, reference)
    answers = dict(zip((*evaluated, *(each.float for each in made[1:])), (reference, *logits, *others), strict=True))
    shape = (1, job.model.config.in_chans, *job.model.config.img_size)
    timed = [artifact for each in made for artifact in (each.float, each.int8)]
    with steps.step("time", TIMED_ROUNDS * len(timed), timed=True) as advance:
        timings = time_artifacts(timed, shape, job.threads, TIMED_ROUNDS, advance)
    entries = [_entry(job, stage, each, logits[i], reference, classes, timings[2 * i], timings[2 * i + 1]) for i, each in enumerate(made)]
    report = {
        "model": job.info.name,
        "recipe": job.recipe.name,
        "images": len(pixels.kept),
        "float": {"top1": float(hits(reference, classes, 1).mean()), "top5": float(hits(reference, classes, 5).mean())},
        "artifacts": entries,
        "limits": job.recipe.limits.model_dump(),
        "machine": {"cpu": cpu_name(), "threads": job.threads, "system": platform.platform(terse=True)},
        "seconds": {name: round(seconds, 2) for name, seconds in steps.seconds.items()},
    }
    return report, {artifact: rows[:GOLDEN_IMAGES] for artifact, rows in answers.items()}


def _check_floats(floats: Sequence[Artifact], pixels: Pixels, preprocessing: Preprocessing, reference: Logits) -> list[Logits]:
    """Checks all but the first of the float artifacts against the logits of the first one; gives theirs of the first images."""
    answers = run_artifacts(floats[1:], pixels, preprocessing, lambda: None, CHECKED_IMAGES)
    for artifact, logits in zip(floats[1:], answers, strict=True):
        parity = sqnr_db(logits, reference[:CHECKED_IMAGES])
        if parity < MIN_SQNR_DB["float"]:
            raise CheckFailed(
                f"the float artifacts {artifact.name} and {floats[0].name} disagree: {parity:.1f} dB, expected at least "
                f"{MIN_SQNR_DB['float']:.0f} dB; one of the exporters or runtimes is broken"
            )
    return answers


def _entry(
    job: Job, stage: Path, each: Made, logits: Logits, reference: Logits, classes: NDArray[np.int64], before: Timing, after: Timing
) -> dict[str, Any]:
    accuracy = compare(logits, reference, classes)
    limits = job.recipe.limits
    computed = integer_operators(job.recipe, load_backend(each.int8.backend)) if each.int8.precision in INTEGER_ACTIVATIONS else ()
    return {
        "backend": each.int8.backend,
        "precision": each.int8.precision,
        "file": each.int8.path.relative_to(stage).as_posix(),
        "search": each.search,
        "integer_operators": sorted(computed),
        "size_bytes": each.int8.size_bytes,
        "float_size_bytes": each.float.size_bytes,
        **{key: _rounded(value) for key, value in asdict(accuracy).items() if key != "worst_class"},
        "worst_class": job.info.labels.names[accuracy.worst_class],
        "within_limits": accuracy.drop_points <= limits.max_drop and accuracy.agreement >= limits.min_agreement,
        **after.report(),
        "float_latency_ms": before.report()["latency_ms"],
        "float_spread": round(before.spread, 3),
        "float_noisy": before.noisy,
        "float_load_ms": round(before.load_ms, 1),
        "float_peak_rss_mb": round(before.peak_rss_mb, 1),
        "speedup": round(before.percentile(50) / after.percentile(50), 3),
    }


def _rounded(value: Any) -> Any:
    return [round(v, 4) for v in value] if isinstance(value, tuple) else round(value, 6)
