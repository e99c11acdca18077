"""What quantization loses, by recipe and by algorithm: every artifact in its own runtime, against float on the same images.

    pip install timm==1.0.31
    python benchmarks/accuracy.py --weights FILE --train DIR --eval DIR [--labels FILE] [--only NAME ...] [--json FILE] [--again]

--train sets ranges and everything that is fitted to images; --eval is only measured. Rows are the stock way (`stock.py`), the recipes, then
the recipes with one algorithm changed at a time, on every fifth image. A row that --json has already is not measured again if recipe,
code and versions are the same, so a run that was cut off goes on; those of which that is not known are kept, and named, unless --again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _entries import save
from rich.console import Console
from rich.table import Table
from stock import STOCK, stock_made_by, stock_model

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import load_backend, package_version
from gcvit_edge.cache import digest, sources
from gcvit_edge.data import Pixels, decode_images, find_images, inputs, read_labels
from gcvit_edge.errors import unknown_name
from gcvit_edge.lower import lower_float, lower_quantized, roundings
from gcvit_edge.measurement.accuracy import Classes, Logits, agreement, check_baseline, compare, hits
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.plan import plan
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import Recipe, parse_recipe, recipe_text
from gcvit_edge.targets.local import run_artifacts
from gcvit_edge.training.loop import weights_digest

# Float answers that the rounding of another CPU may turn. AVX2 in place of AVX-512 moved logits by 1e-5 at most (OpenVINO, 1,500 images of
# Tiny ImageNet), and the two highest of an image are as close as that about once in 100,000: two in 5,000 are not to be expected.
NEAR_TIES = 1


@dataclass(frozen=True)
class Row:
    """A line of the table: a recipe, changed by `change`, for some of its backends, on every `every`-th image.

    stock: each tool's own exporter and quantizer on the recipe's calibration images, instead of ours.
    """

    name: str
    recipe: str
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe
    backends: tuple[str, ...] | None = None
    every: int = 5
    stock: bool = False


def calibration(**changes: Any) -> Callable[[Recipe], Recipe]:
    """A change of the recipe's calibration."""
    return lambda recipe: recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


def changed(**changes: Any) -> Callable[[Recipe], Recipe]:
    """A change of the recipe itself."""
    return lambda recipe: recipe.model_copy(update=changes)


ROWS = (
    Row("stock INT8", "int8_ptq", every=1, stock=True),
    *(Row(name, name, every=1) for name in ("int8_ptq", "int8_ptq_full", "w4a8_ptq", "int4_weights", "fp16", "bf16")),
    Row("int8_ptq_full, residual additions in float", "int8_ptq_full", changed(operators=("linear", "conv", "attention")), every=1),
    Row("w4a8_ptq, layers rounded each for itself", "w4a8_ptq", changed(rounding="adaptive"), every=1),
    Row("int4_weights, layers rounded each for itself", "int4_weights", changed(rounding="adaptive"), every=1),
    Row("int8_ptq, every fifth image", "int8_ptq"),
    Row("int8_ptq, other calibration images", "int8_ptq", calibration(seed=1)),
    Row("int8_ptq, 32 calibration images", "int8_ptq", calibration(images=32), ("openvino",)),
    Row("int8_ptq, 512 calibration images", "int8_ptq", calibration(images=512), ("openvino",)),
    *(Row(f"int8_ptq, {kind} ranges", "int8_ptq", calibration(ranges=kind), ("openvino",))
      for kind in ("minmax", "average", "percentile", "entropy")),
    Row("int8_ptq, minmax ranges, other calibration images", "int8_ptq", calibration(ranges="minmax", seed=1), ("openvino",)),
    Row("int8_ptq, no smoothing", "int8_ptq", changed(smoothing=False)),
    Row("int8_ptq, no centring", "int8_ptq", changed(centering=False), ("openvino",)),
    Row("int8_ptq, no equalization", "int8_ptq", changed(equalization=False), ("executorch", "openvino")),
    Row("int8_ptq, nearest rounding", "int8_ptq", changed(rounding="nearest")),
    Row("int8_ptq, nearest rounding, bias correction", "int8_ptq", changed(rounding="nearest", bias_correction=True), ("openvino",)),
    Row("int8_ptq_full, every fifth image", "int8_ptq_full"),
    Row("int8_ptq_full, no equalization", "int8_ptq_full", changed(equalization=False)),
    Row("int8_ptq_full, range of the softmax fixed", "int8_ptq_full", calibration(unit_softmax=True), ("openvino", "onnx")),
    Row("int4_weights, every fifth image", "int4_weights", backends=("onnx",)),
    Row("int4_weights, nearest rounding, bias correction", "int4_weights", changed(rounding="nearest", bias_correction=True), ("onnx",)),
)  # fmt: skip


@dataclass(frozen=True)
class Bed:
    """What all rows have in common. reference: float logits (N, classes) of the evaluation images."""

    model: GCViT
    info: ModelInfo
    train: Path
    identity: str  # of weights and train
    pixels: Pixels
    classes: Classes
    reference: Logits
    steps: Steps


def recipe_of(row: Row) -> Recipe:
    """The recipe as it is used."""
    return row.change(parse_recipe(recipe_text(row.recipe), row.recipe))


def made_by(row: Row, weights_and_images: str) -> str:
    """Digest of what decides the artifacts of a row: recipe, code of the package, versions, weights and the images that calibrate."""
    recipe = recipe_of(row)
    names = row.backends or recipe.backends
    packages = sorted({package for name in names for package in load_backend(name).PACKAGES})
    versions = (f"{package} {package_version(package)}" for package in packages)
    parts = [recipe.model_dump_json(exclude={"description", "limits"}), repr(names), weights_and_images, sources(), *versions]
    return digest([*parts, stock_made_by()] if row.stock else parts)


def measure(row: Row, bed: Bed, work: Path) -> list[dict[str, Any]]:
    """One entry for each backend of a row, and how far the backends agree with one another."""
    recipe = recipe_of(row)
    info = bed.info
    images = find_images(bed.train, "calibration").select(recipe.calibration.images, recipe.calibration.seed)
    pixels = decode_images(images, info.preprocessing, work / "calib.npy")
    names = row.backends or recipe.backends
    with bed.steps.step(f"{row.name}: make"):
        artifacts = make_stock(names, pixels, bed, work) if row.stock else make_ours(names, recipe, pixels, bed, work)
    with bed.steps.step(f"{row.name}: run", len(artifacts) * len(bed.classes[:: row.every])) as advance:
        some = replace(bed.pixels, file=work / "some.npy", kept=bed.pixels.kept[:: row.every])
        np.save(some.file, bed.pixels.load()[:: row.every])
        logits = run_artifacts(artifacts, some, info.preprocessing, advance)
    return [entry(row, artifact, each, logits, bed) for artifact, each in zip(artifacts, logits, strict=True)]


def make_ours(names: Iterable[str], recipe: Recipe, pixels: Pixels, bed: Bed, work: Path) -> list[Artifact]:
    """As `gcvit-edge quantize` makes them."""
    calibrated = calibrate(bed.model, recipe, lambda: inputs(pixels, bed.info.preprocessing), roundings(recipe, names))
    return [lower_quantized(name, calibrated, bed.info, recipe, work / "made") for name in names]


def make_stock(names: Iterable[str], pixels: Pixels, bed: Bed, work: Path) -> list[Artifact]:
    """As each runtime's own tools make them."""
    images, model = list(inputs(pixels, bed.info.preprocessing)), stock_model(bed.info.name, bed.model)
    folder = work / "stock"
    folder.mkdir()
    return [each for name in names for each in STOCK[name](model, images, folder) if each.precision == "int8"]


def check_names(names: Iterable[str], source: str) -> None:
    """Refuses names that no row has."""
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise SystemExit(f"{source}: {unknown_name('row', name, known)}")


def check_rows(entries: list[dict[str, Any]], bed: Bed, file: Path | None) -> None:
    """Refuses to add to rows that were measured against another float model or on other images, as far as the float answers tell."""
    for each in entries:
        every = next(row.every for row in ROWS if row.name == each["row"])
        images, top1 = len(bed.classes[::every]), float_top1(bed, every)
        if each["images"] != images or round(abs(each["float_top1"] - top1) * images) > NEAR_TIES:
            raise SystemExit(
                f"{file} has rows of other --weights or --eval, such as {each['row']!r}: float top-1 {each['float_top1']:.2%} on "
                f"{each['images']} images, here {top1:.2%} on {images}; give another --json"
            )


def reusable(row: Row, weights_and_images: str, entries: list[dict[str, Any]], again: bool) -> bool:
    """Whether the row's entries are of this recipe, this code and these versions; where they do not say, unless `again`."""
    found = {each.get("made_by") for each in entries if each["row"] == row.name}
    if found == {None} and not again:
        print(f"{row.name}: not checked whether recipe, code and versions are the same; --again measures it anew", file=sys.stderr)
        return True
    return found == {made_by(row, weights_and_images)}


def float_top1(bed: Bed, every: int) -> float:
    return round(float(hits(bed.reference[::every], bed.classes[::every], 1).mean()), 6)


def entry(row: Row, artifact: Artifact, logits: Logits, all_logits: list[Logits], bed: Bed) -> dict[str, Any]:
    """One line of the result. cross: agreement with the other runtimes' artifacts of the row, the lowest."""
    reference, classes = bed.reference[:: row.every], bed.classes[:: row.every]
    accuracy = compare(logits, reference, classes)
    others = [agreement(logits, other) for other in all_logits if other is not logits]
    return {
        "row": row.name,
        "backend": artifact.backend,
        "images": len(classes),
        "float_top1": float_top1(bed, row.every),
        "top1": round(accuracy.top1, 6),
        "drop_points": round(accuracy.drop_points, 4),
        "drop_ci95": [round(end, 4) for end in accuracy.drop_ci95],
        "agreement": round(accuracy.agreement, 6),
        "agreement_ci95": [round(end, 6) for end in accuracy.agreement_ci95],
        "sqnr_db": round(accuracy.sqnr_db, 2),
        "sqnr_ci95": [round(end, 2) for end in accuracy.sqnr_ci95],
        "cross": round(min(others), 6) if others else None,
        "size_bytes": artifact.size_bytes,
        "made_by": made_by(row, bed.identity),
    }


def show(entries: list[dict[str, Any]]) -> Table:
    """The table for people."""
    table = Table("row", "runtime", caption="with 95 % intervals; cross: agreement with the other runtimes")
    for heading in ("top-1", "drop, points", "agreement", "SQNR, dB", "cross", "MB"):
        table.add_column(heading, justify="right")
    for each in entries:
        drop, same, noise = each["drop_ci95"], each["agreement_ci95"], each["sqnr_ci95"]
        table.add_row(
            each["row"], each["backend"], f"{each['top1']:.2%}", f"{each['drop_points']:+.2f} ({drop[0]:+.2f} to {drop[1]:+.2f})",
            f"{each['agreement']:.2%} ({same[0]:.2%} to {same[1]:.2%})", f"{each['sqnr_db']:.1f} ± {(noise[1] - noise[0]) / 2:.1f}",
            "" if each["cross"] is None else f"{each['cross']:.2%}",
            f"{each['size_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="class names in the order of the logits (default: the checkpoint's)")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="measure rows of --json anew that do not say what made them")
    arguments = parser.parse_args()
    entries = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    check_names((each["row"] for each in entries), str(arguments.json))
    check_names(arguments.only or (), "--only")
    steps = Steps(Console(stderr=True))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        labels = read_labels(arguments.labels) if arguments.labels else None
        job = plan(weights=arguments.weights, labels=labels, calib=arguments.train, eval=arguments.eval, output=work / "unused")
        preprocessing = job.info.preprocessing
        pixels = decode_images(job.evaluation, preprocessing, work / "eval.npy")
        classes = job.classes[pixels.kept]
        # of the fastest of our float artifacts; those of other runtimes differ by rounding alone
        artifact = lower_float("openvino", job.model, job.info, work)
        with steps.step("float", len(classes)) as advance:
            reference = run_artifacts([artifact], pixels, preprocessing, advance)[0]
        check_baseline(reference, classes)
        identity = digest([weights_digest(job.model.state_dict()), *find_images(arguments.train, "calibration").listing()])
        bed = Bed(job.model, job.info, arguments.train, identity, pixels, classes, reference, steps)
        check_rows(entries, bed, arguments.json)
        order = [row.name for row in ROWS]
        for row in ROWS:
            if (arguments.only is None or row.name in arguments.only) and not reusable(row, bed.identity, entries, arguments.again):
                entries = [each for each in entries if each["row"] != row.name] + measure(row, bed, work)
                entries.sort(key=lambda each: order.index(each["row"]))
                if arguments.json:
                    save(entries, arguments.json)
    Console(width=160).print(show(entries))


if __name__ == "__main__":
    main()
