"""Where quantization hurts: which layers, in which runtime, for which activations and classes; as a report for tables and plots."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.data import Labels, Pixels, Preprocessing, decode_images
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.lower import lower_float, lower_network, lower_quantized, simulate, written
from gcvit_edge.measurement.accuracy import Classes, Logits, agreement, check_baseline, finite_db, hits, paired_drop, sqnr_db, sqnr_interval
from gcvit_edge.measurement.machine import cpu_name
from gcvit_edge.measurement.parity import MARGIN_DB, MIN_SQNR_DB
from gcvit_edge.pipeline import prepare, ranking_images
from gcvit_edge.plan import Job, plan
from gcvit_edge.progress import Steps
from gcvit_edge.recipe import Recipe
from gcvit_edge.search import Layer, candidates, frontier, keeping, measurements, predicted_ms, rank
from gcvit_edge.targets.local import Session, run_artifacts, time_artifacts

if TYPE_CHECKING:
    from gcvit_edge.quantization.calibrate import Calibrated

COMPARED_IMAGES = 4
TIMED_ROUNDS = 10


@dataclass(frozen=True)
class Deployed:
    """What is looked at of one backend. recipe: with the layers that stay float in this artifact. plain: without those that a search
    found, where there are any."""

    backend: str
    recipe: Recipe
    float: Artifact
    int8: Artifact
    plain: Artifact | None


def plan_analysis(
    bundle: Bundle | None,
    recipe: str | None,
    scratch: Path,
    *,
    model: str | None,
    weights: str | None,
    num_classes: int | None,
    labels: Labels | None,
    preprocessing: Preprocessing | None,
    calib: Path | None,
    eval: Path | None,
    train: Path | None,
    backends: Sequence[str] | None,
    threads: int | None,
    device: str | None,
) -> Job:
    """Checks a request; the arguments are those of `quantize`. A bundle brings its recipe, and backends, labels and preprocessing
    that are not given. scratch: an empty folder. What a recipe fine-tunes is in no bundle, so it is fine-tuned again, for all backends
    that the bundle was made for.

    Raises:
        UserError: bad input; the bundle is of another network than the weights, or has no recipe; there are several processes.
    """
    made: tuple[str, ...] = ()
    if bundle is not None:
        if bundle.manifest.recipe is None:
            raise UserError("the bundle has float artifacts only, there is nothing to analyze; give one that quantize made")
        for backend in backends or ():
            bundle.artifact(backend)
        made = tuple(artifact.backend for artifact in bundle.artifacts if artifact.precision != "float")
        backends = backends or made
        labels, preprocessing = labels or bundle.info.labels, preprocessing or bundle.info.preprocessing
        if recipe is not None:
            raise UserError(
                f"a bundle is analyzed by the recipe that made it ({bundle.manifest.recipe.name}); leave out --recipe, or the bundle"
            )
        recipe = str(scratch / "recipe.yaml")
        Path(recipe).write_text(bundle.manifest.recipe.text, encoding="utf-8")
    recipe = recipe or "int8_ptq"
    job = plan(
        recipe, model, weights=weights, num_classes=num_classes, labels=labels, preprocessing=preprocessing, calib=calib, eval=eval,
        train=train, backends=backends, threads=threads, device=device, output=scratch / "no bundle is made", searching=False,
    )  # fmt: skip
    if bundle is not None and job.info.config != bundle.info.config:
        raise UserError(
            f"the bundle is of {bundle.info.name} ({bundle.info.origin.source}), but these weights are of {job.info.name} in "
            "another shape; give --weights FILE that it was made from"
        )
    if job.tuning is None:
        return job
    if job.tuning.accelerator.num_processes > 1:
        raise UserError("an analysis is made by one process; start it without accelerate launch")
    from gcvit_edge.training.qat import saved_in_cache

    tuned_for = made or job.backends
    return replace(job, backends=tuned_for, tuning=saved_in_cache(job.model, job.tuning, tuned_for))


def analyze(job: Job, bundle: Bundle | None, steps: Steps, backends: Sequence[str] | None = None) -> dict[str, Any]:
    """The report on a job of `plan_analysis`. bundle: take the artifacts from here instead of making them; `job` must be of its model.
    backends: of the job's, those to look at (None: all).

    Raises:
        CheckFailed: the float model is no better than guessing; an artifact cannot be made; the weights are not those of the bundle.
    """
    from gcvit_edge.quantization.activations import activations

    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as scratch:
        work = Path(scratch)
        with steps.step("read evaluation images", len(job.evaluation.files)) as advance:
            pixels = decode_images(job.evaluation, job.info.preprocessing, work / "eval.npy", advance)
        images = ranking_images(job, work, steps)
        calibrated, prepared = prepare(job, work, steps)
        with steps.step("activations"):
            places = [_rounded(asdict(place)) for place in activations(calibrated.network, images)]
        looked_at = [name for name in job.backends if not backends or name in backends]
        entries = [_backend(job, name, bundle, calibrated, images, pixels, work, steps) for name in looked_at]
    if job.tuning is not None:
        job.tuning.state.unlink(missing_ok=True)  # the saved run is of no more use
    return {
        "model": job.info.name,
        "recipe": job.recipe.name,
        "images": {"sensitivity": len(images), "compared": min(COMPARED_IMAGES, len(images)), "evaluation": len(pixels.kept)},
        "machine": {"cpu": cpu_name(), "threads": job.threads},
        "activations": places,
        "backends": entries,
        **({"training": prepared["training"]} if job.tuning is not None else {}),
        "seconds": {name: round(seconds, 2) for name, seconds in steps.seconds.items()},
    }


def _backend(
    job: Job, name: str, bundle: Bundle | None, calibrated: "Calibrated", images: list[NDArray[np.float32]], pixels: Pixels, work: Path,
    steps: Steps,
) -> dict[str, Any]:  # fmt: skip
    from gcvit_edge.quantization.keep import kept_layers

    deployed = _deployed(job, name, bundle, calibrated, work, steps)
    if bundle is not None:
        _check_weights(deployed, bundle, calibrated)
    layers = rank(name, calibrated, job.recipe, images, steps)
    if not layers:
        raise UserError(f"recipe {job.recipe.name} rounds no layer in {name}, so there is nothing to analyze; leave fewer layers in float")
    all_rounded, without = _without(name, calibrated, job.recipe, layers, images, steps)
    classes = job.classes[pixels.kept]
    shipped = [np.fromfile(file, np.uint8) for file in deployed.int8.files] if bundle else []
    names = (job.info.labels.names, [layer.name for layer in layers])
    decisive = [*images, pixels.load()[: len(classes)], classes, *map(np.array, names), *shipped]
    known = measurements(name, calibrated, deployed.recipe, decisive)
    compared = known.get("layer by layer", lambda: _layer_by_layer(deployed, job, calibrated, images[:COMPARED_IMAGES], work, steps))
    drifted = known.get("drift by class", lambda: _drift(deployed, job, pixels, classes, steps))
    timed = [deployed.float, deployed.int8, *([] if deployed.plain is None else [deployed.plain])]
    with steps.step(f"{name}: time", len(timed) * TIMED_ROUNDS, timed=True) as advance:
        timings = time_artifacts(timed, images[0].shape, job.threads, TIMED_ROUNDS, advance)
    float_ms, int8_ms, plain_ms = (timing.percentile(50) for timing in (*timings[:2], timings[-1]))
    kept = kept_layers(calibrated.network, deployed.recipe.keep_float)
    return {
        "backend": name,
        "precision": job.recipe.precision,
        "kept_float": sorted(kept),
        "float_ms": round(float_ms, 3),
        "int8_ms": round(int8_ms, 3),
        "plain_ms": round(plain_ms, 3),
        "all_rounded_db": round(all_rounded, 2),
        "layers": [
            {
                "layer": layer.name, "work": layer.work, "alone_db": round(layer.alone_db, 2), "without_db": round(without[layer.name], 2),
                **compared["layers"][layer.name], "kept_float": layer.name in kept,
            }
            for layer in layers
        ],
        "logits": compared["logits"],
        "pareto": pareto(layers, float_ms, plain_ms),
        "drift": drifted,
    }  # fmt: skip


def _deployed(job: Job, name: str, bundle: Bundle | None, calibrated: "Calibrated", work: Path, steps: Steps) -> Deployed:
    """The artifacts, made unless the bundle has them."""
    found: dict[str, Artifact] = {a.precision: a for a in bundle.artifacts if a.backend == name} if bundle else {}
    entries = [entry for entry in bundle.report["artifacts"] if entry["backend"] == name] if bundle else []
    kept = [layer for entry in entries for layer in (entry.get("search") or {}).get("kept_float", [])]
    recipe = keeping(job.recipe, kept)
    if "float" not in found:
        with steps.step(f"{name}: export float"):
            found["float"] = lower_float(name, job.model, job.info, work)
    precision = job.recipe.precision
    if precision not in found:
        with steps.step(f"{name}: export {precision}"):
            found[precision] = lower_quantized(name, calibrated, job.info, recipe, work)
    plain = None
    if kept:
        folder = work / f"{name}.plain"
        folder.mkdir()
        with steps.step(f"{name}: export {precision} without a search"):
            plain = lower_quantized(name, calibrated, job.info, job.recipe, folder)
    return Deployed(name, recipe, found["float"], found[precision], plain)


def _check_weights(deployed: Deployed, bundle: Bundle, calibrated: "Calibrated") -> None:
    """That the bundle's artifact is of these weights: what is simulated gives its golden logits, within what a runtime's own rounding
    may add, which is as much as it was measured to be from float. Calibration images other than those of the bundle add less."""
    from gcvit_edge.quantization.sensitivity import logits

    golden, recipe = bundle.golden_input(), deployed.recipe
    got = logits(simulate(deployed.backend, calibrated, recipe), [golden[i : i + 1] for i in range(len(golden))])
    found = sqnr_db(got, bundle.golden_logits(deployed.int8))
    expected, measured = MIN_SQNR_DB["int8"], bundle.measured_db(deployed.int8)
    if measured is not None:
        expected = min(expected, measured - MARGIN_DB)
    if found < expected:
        raise CheckFailed(
            f"{deployed.int8.name} of the bundle is not of these weights: {found:.1f} dB between its golden logits and theirs, "
            f"expected {expected:.0f}; give those that it was made from{', and its --train' if recipe.qat else ''}"
        )


def _without(
    name: str, calibrated: "Calibrated", recipe: Recipe, layers: Sequence[Layer], images: list[NDArray[np.float32]], steps: Steps
) -> tuple[float, dict[str, float]]:
    """SQNR in dB of the logits when every layer is rounded, and when each of `layers` alone stays float."""
    from gcvit_edge.quantization.sensitivity import exchange, logits

    network, quantized = written(name, calibrated, recipe), simulate(name, calibrated, recipe)
    known = measurements(name, calibrated, recipe, images)
    with steps.step(f"{name}: all layers but one", len(layers)) as advance:
        all_rounded = known.get("all rounded", lambda: finite_db(sqnr_db(logits(quantized, images), logits(network, images))))
        return all_rounded, exchange(network, quantized, [layer.name for layer in layers], images, known, "without", advance)


def _layer_by_layer(
    deployed: Deployed, job: Job, calibrated: "Calibrated", images: Sequence[NDArray[np.float32]], work: Path, steps: Steps
) -> dict[str, Any]:
    """SQNR in dB of every layer's output: simulated against float, deployed against simulated, deployed against float."""
    import torch

    from gcvit_edge.quantization.sensitivity import rounded_layers
    from gcvit_edge.quantization.taps import sizes, split, tapped

    name = deployed.backend
    network, quantized = written(name, calibrated, job.recipe), simulate(name, calibrated, deployed.recipe)
    layers = rounded_layers(network, simulate(name, calibrated, job.recipe))
    example = torch.from_numpy(images[0])
    widths = sizes(network, layers, example)
    with steps.step(f"{name}: layer by layer"):
        graph = tapped(quantized, layers, example)
        with torch.no_grad():
            float_rows, simulated_rows = (
                np.concatenate([each(torch.from_numpy(image)).numpy() for image in images])
                for each in (tapped(network, layers, example), graph)
            )
        folder = work / f"{name}.tapped"
        folder.mkdir()
        artifact = lower_network(name, graph, job.recipe.precision, job.info, folder)
        stacked = np.concatenate(images)
        with Session(artifact, threads=job.threads) as session:
            rows = session.infer(stacked, lambda: None)
        with Session(deployed.int8, threads=job.threads) as session:
            untapped = session.infer(stacked, lambda: None)
    parts = zip(split(float_rows, widths), split(simulated_rows, widths), split(rows, widths), strict=True)
    compared = [
        {
            "simulated_db": _db(simulated, reference), "deployed_db": _db(answer, reference),
            "deployed_to_simulated_db": _db(answer, simulated),
        }
        for reference, simulated, answer in parts
    ]  # fmt: skip
    logits = compared[0] | {"with_taps_to_without_db": _db(split(rows, widths)[0], untapped)}
    return {"logits": logits, "layers": dict(zip(layers, compared[1:], strict=True))}


def _db(x: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return round(finite_db(sqnr_db(x, reference)), 2)


def pareto(layers: Sequence[Layer], float_ms: float, plain_ms: float) -> dict[str, Any]:
    """SQNR of the logits against latency, both predicted (noise adds up, time is shared out by multiplications), as ever more layers
    become float: in the order of the frontier, and from the image on. Points are [layers, ms, dB]; of the last, all float, dB is null.
    plain_ms: latency with all of them rounded.

    candidates: how many layers `int8_auto` tries.
    """

    def path(order: Sequence[Layer]) -> list[list[float | None]]:
        points: list[list[float | None]] = []
        for count in range(len(order) + 1):
            left = sum(layer.noise for layer in order[count:])
            decibels = round(-10 * float(np.log10(left)), 2) if left > 0 else None
            points.append([count, round(predicted_ms(order, count, float_ms, plain_ms), 4), decibels])
        return points

    order = frontier(layers)
    names = [layer.name for layer in order]
    return {"order": names, "frontier": path(order), "from_the_image": path(layers), "candidates": candidates(order)}


def _drift(deployed: Deployed, job: Job, pixels: Pixels, classes: Classes, steps: Steps) -> dict[str, Any]:
    """What each class loses, float against INT8 artifact."""
    with steps.step(f"{deployed.backend}: drift by class", 2 * len(classes)) as advance:
        before, after = run_artifacts([deployed.float, deployed.int8], pixels, job.info.preprocessing, advance)
    check_baseline(before, classes)
    return drift(after, before, classes, job.info.labels)


def drift(logits: Logits, reference: Logits, classes: Classes, labels: Labels) -> dict[str, Any]:
    """Drop in points and SQNR with their 95 % intervals, and agreement: of all images (N,), and by class, the largest drop first."""

    def describe(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        a, b, wanted = logits[chosen], reference[chosen], classes[chosen]
        before, after = hits(b, wanted, 1), hits(a, wanted, 1)
        drop, interval = paired_drop(before, after)
        return {
            "images": len(wanted), "float_top1": round(float(before.mean()), 4), "int8_top1": round(float(after.mean()), 4),
            "lost": int((before & ~after).sum()), "won": int((~before & after).sum()), "drop_points": round(drop, 3),
            "drop_ci95": [round(end, 3) for end in interval], "agreement": round(agreement(a, b), 4), "sqnr_db": _db(a, b),
            "sqnr_ci95": [round(finite_db(end), 2) for end in sqnr_interval(a, b)],
        }  # fmt: skip

    by_class = [{"class": labels.names[index], **describe(classes == index)} for index in np.unique(classes)]
    return {"all": describe(np.ones(len(classes), bool)), "classes": sorted(by_class, key=lambda each: -each["drop_points"])}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
