"""Mixed precision: which layers of a backend's artifact stay float, so that it loses little accuracy for little time.

Layers are ranked in PyTorch by what their rounding alone adds to the noise of the logits, for each multiplication that stays float
(`frontier`). How many of them stay float is then decided by the artifact itself, in its own runtime: the fewest, in steps of
2 dB, with which the upper end of the drop's 95 % interval is within the limit, on images that neither calibrate nor evaluate.
None, if plain INT8 is. (Several candidates are judged by the same images, each with 95 %, so the chosen one may owe some of its drop to
luck; the evaluation images know nothing of the choice.) Each backend is searched for itself, because noise depends on how a runtime
rounds, and time on its kernels.

The safe choice, with which the result is compared, knows nothing of sensitivity: layers stay float from the image on, the fewest
with which the noise is as low. Should it be the faster one, and within the limit, it is taken.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import load_backend, package_version
from gcvit_edge.cache import Measurements, cache_file, digest, sources
from gcvit_edge.data import Pixels, Preprocessing
from gcvit_edge.lower import lower_quantized, rounding, simulate, written
from gcvit_edge.measurement.accuracy import Logits, check_baseline, compare, hits, images_to_judge, sqnr_db
from gcvit_edge.measurement.machine import cpu_name
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.progress import Steps
from gcvit_edge.recipe import Limits, Recipe
from gcvit_edge.targets.local import TIMED_ROUNDS, run_artifacts, time_artifacts

if TYPE_CHECKING:
    from gcvit_edge.quantization.calibrate import Calibrated

STEP_DB = 2.0  # between the candidates that are tried


@dataclass(frozen=True)
class HeldOut:
    """Images that neither calibrate nor evaluate. classes: (N,) of those that decoded. ranking: some of them, (1, C, H, W) each, by
    which layers are ranked."""

    pixels: Pixels
    classes: NDArray[np.int64]
    preprocessing: Preprocessing
    ranking: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Layer:
    """alone_db: SQNR of the logits when it alone is rounded. work: its multiplications, or the numbers that a point rounds."""

    name: str
    alone_db: float
    work: int

    @property
    def noise(self) -> float:
        """Power, of the signal's."""
        return 10 ** (-self.alone_db / 10)


def frontier(layers: Sequence[Layer]) -> list[Layer]:
    """The order in which layers become float: most noise for each multiplication first. Noise of layers adds up."""
    return sorted(layers, key=lambda layer: -layer.noise / max(layer.work, 1))


def candidates(layers: Sequence[Layer]) -> list[int]:
    """How many layers of a frontier to try: none, then each time so many that the noise falls by at least 2 dB, at last all."""
    left = sum(layer.noise for layer in layers)
    counts, wanted = [0], left * 10 ** (-STEP_DB / 10)
    for count, layer in enumerate(layers[:-1], 1):
        left -= layer.noise
        if left <= wanted:
            counts.append(count)
            wanted = max(left, 0) * 10 ** (-STEP_DB / 10)
    return [*counts, len(layers)]


def measurements(name: str, calibrated: "Calibrated", recipe: Recipe, images: Iterable[NDArray[Any]]) -> Measurements:
    """What was measured before of backend `name` with these weights, ranges and images (with what else decides), in this arithmetic
    and these versions, on this kind of CPU."""
    from gcvit_edge.quantization.sensitivity import identity

    backend = load_backend(name)
    versions = [sources(), cpu_name(), *(f"{package} {package_version(package)}" for package in backend.PACKAGES)]
    runtime = rounding(recipe, backend)
    rounded = [repr((recipe.precision, recipe.keep_float)), repr(sorted(runtime.operators)), repr((runtime.arithmetic, runtime.form))]
    decided = [name, *rounded, *versions, repr(sorted(calibrated.ranges.items()))]
    return Measurements(cache_file(digest(chain(decided, identity(calibrated.network, calibrated.fitted), images))))


def rank(name: str, calibrated: "Calibrated", recipe: Recipe, images: Sequence[NDArray[np.float32]], steps: Steps) -> list[Layer]:
    """The layers that backend `name` rounds, in the order of the network, each measured alone on `images` (1, C, H, W)."""
    from gcvit_edge.quantization.sensitivity import exchange, rounded_layers, work

    network, quantized = written(name, calibrated, recipe), simulate(name, calibrated, recipe)
    names = rounded_layers(network, quantized)
    known = measurements(name, calibrated, recipe, images)
    with steps.step(f"{name}: sensitivity of layers", len(names)) as advance:
        alone = exchange(network, quantized, names, images, known, "alone", advance)
        weights = work(network, names, images[0])
    return [Layer(layer, alone[layer], weights[layer]) for layer in names]


def search(
    name: str, calibrated: "Calibrated", info: ModelInfo, recipe: Recipe, float_artifact: Artifact, held_out: HeldOut, folder: Path,
    scratch: Path, threads: int, steps: Steps,
) -> tuple[Artifact, dict[str, Any]]:  # fmt: skip
    """Writes the artifact of backend `name` that keeps the limits of `recipe` with the least work in float into `folder`; gives it and
    what a report says of the search.

    held_out: images that judge. scratch: a folder for what is only tried, to be removed afterwards: several artifacts. threads: with
    which artifacts are timed.

    Raises:
        CheckFailed: float is no better than guessing on the images that judge.
    """
    judges = [held_out.pixels.load()[: len(held_out.classes)], held_out.classes]
    known = measurements(name, calibrated, recipe, [*held_out.ranking, *judges])  # those that rank are normalised

    @cache
    def answers(artifact: Artifact) -> Logits:
        return run_artifacts([artifact], held_out.pixels, held_out.preprocessing, lambda: None)[0]

    @cache
    def lower(keep: tuple[str, ...]) -> Artifact:
        return lower_quantized(name, calibrated, info, keeping(recipe, keep), Path(mkdtemp(dir=scratch)))

    def accuracy(keep: tuple[str, ...]) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            return asdict(compare(answers(lower(keep)), answers(float_artifact), held_out.classes))

        with steps.step(f"{name}: try {len(keep)} layers in float"):
            return known.get(f"accuracy with {digest(sorted(keep))} float", measure)

    def float_top1() -> float:
        if len(held_out.classes) >= images_to_judge(len(info.labels.names)):
            check_baseline(answers(float_artifact), held_out.classes)
        return float(hits(answers(float_artifact), held_out.classes, 1).mean())

    with steps.step(f"{name}: float on held-out images"):
        judged = {"images": len(held_out.classes), "float_top1": round(known.get("top-1 of float", float_top1), 6)}
    plain = accuracy(())
    tried = [_trial((), plain, recipe.limits)]
    if within(plain, recipe.limits):
        report = {**judged, "kept_float": [], "found": [], "safe_choice": [], "tried": tried, "latency_ms": None}
        return moved(lower(()), folder), report
    images = held_out.ranking
    order = frontier(rank(name, calibrated, recipe, images, steps))
    counts = candidates(order)
    failed, good = 0, len(counts) - 1
    while good - failed > 1:
        middle = min(max(2 * failed, 1), (failed + good) // 2)  # few are enough, as a rule
        keep = tuple(layer.name for layer in order[: counts[middle]])
        measured = accuracy(keep)
        tried.append(_trial(keep, measured, recipe.limits))
        failed, good = (failed, middle) if within(measured, recipe.limits) else (middle, good)
    keep = tuple(layer.name for layer in order[: counts[good]])
    if good == len(counts) - 1:
        tried.append(_trial(keep, accuracy(keep), recipe.limits))
    with steps.step(f"{name}: make the safe choice"):
        safe = safe_choice(name, calibrated, recipe, keep, images)
        timed = {"float": float_artifact, "plain": lower(()), "chosen": lower(keep), "safe": lower(tuple(safe))}
    with steps.step(f"{name}: time", TIMED_ROUNDS * len(timed), timed=True) as advance:
        timings = time_artifacts(list(timed.values()), images[0].shape, threads, TIMED_ROUNDS, advance)
    latency = {kind: round(timing.percentile(50), 3) for kind, timing in zip(timed, timings, strict=True)}
    latency["predicted"] = round(predicted_ms(order, counts[good], latency["float"], latency["plain"]), 3)
    shipped = keep
    if latency["safe"] < latency["chosen"]:  # time is not multiplications alone
        measured = accuracy(tuple(safe))
        tried.append(_trial(safe, measured, recipe.limits))
        shipped = tuple(safe) if within(measured, recipe.limits) else keep
    report = {**judged, "kept_float": sorted(shipped), "found": sorted(keep), "safe_choice": safe, "tried": tried, "latency_ms": latency}
    return moved(lower(shipped), folder), report


def moved(artifact: Artifact, folder: Path) -> Artifact:
    """The artifact, its files moved to below `folder` from where it was made."""
    made = artifact.path.parents[len(Path(load_backend(artifact.backend).ARTIFACT).parts) - 1]
    files = tuple(folder / file.relative_to(made) for file in artifact.files)
    for before, after in zip(artifact.files, files, strict=True):
        after.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(before, after)
    return replace(artifact, path=files[0], files=files)


def predicted_ms(order: Sequence[Layer], count: int, float_ms: float, int8_ms: float) -> float:
    """Latency with the first `count` layers of `order` in float: what INT8 saves is shared out by multiplications."""
    share = sum(layer.work for layer in order[:count]) / max(sum(layer.work for layer in order), 1)
    return int8_ms + share * (float_ms - int8_ms)


def within(accuracy: dict[str, Any], limits: Limits) -> bool:
    """Whether the upper end of the drop's 95 % interval is within the limit, and the agreement is."""
    return accuracy["drop_ci95"][1] <= limits.max_drop and accuracy["agreement"] >= limits.min_agreement


def keeping(recipe: Recipe, layers: Sequence[str]) -> Recipe:
    """The same recipe with these layers in float too."""
    return recipe.model_copy(update={"keep_float": (*recipe.keep_float, *layers)})


def safe_choice(
    name: str, calibrated: "Calibrated", recipe: Recipe, keep: Sequence[str], images: Sequence[NDArray[np.float32]]
) -> list[str]:
    """The fewest layers from the image on which, left float, leave no more noise than `keep` does, on `images` (1, C, H, W)."""
    from gcvit_edge.quantization.sensitivity import exchanged, logits, rounded_layers

    network, quantized = written(name, calibrated, recipe), simulate(name, calibrated, recipe)
    names = rounded_layers(network, quantized)
    reference = logits(network, images)

    def sqnr(layers: Sequence[str]) -> float:
        with exchanged(quantized, network, layers):
            return sqnr_db(logits(quantized, images), reference)

    wanted = sqnr(keep)
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sqnr(names[:middle]) >= wanted else (middle + 1, high)
    return names[:low]


def _trial(keep: Sequence[str], accuracy: dict[str, Any], limits: Limits) -> dict[str, Any]:
    return {
        "layers_float": len(keep),
        "drop_points": round(accuracy["drop_points"], 4),
        "drop_ci95": [round(end, 4) for end in accuracy["drop_ci95"]],
        "agreement": round(accuracy["agreement"], 6),
        "sqnr_db": round(accuracy["sqnr_db"], 2),
        "within": within(accuracy, limits),
    }
