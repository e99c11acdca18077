"""Ours against the stock way, in every runtime, interleaved in one run.

    pip install timm==1.0.31
    python benchmarks/vs_stock.py [--model gcvit_xxtiny] [--json FILE]

Stock is what a user does without us: timm's model, each tool's own exporter and INT8 quantizer, with their defaults. Ours is
what `gcvit-edge quantize --recipe int8_ptq` makes. Both have the same weights, are calibrated on the same images and timed on the
same input: one fresh process an artifact, the same threads, in turn, so that a slow minute of the machine hits all alike.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import backend_names
from gcvit_edge.data import decode_images, find_images, inputs
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.machine import cpu_name
from gcvit_edge.model.create import create_model, describe_model, load_model
from gcvit_edge.model.deploy import deploy
from gcvit_edge.model.form import Form
from gcvit_edge.plan import SAMPLE_MODEL, sample_weights
from gcvit_edge.progress import Steps
from gcvit_edge.quantize.ranges import observe
from gcvit_edge.recipe import parse_recipe, recipe_text
from gcvit_edge.resources import resource_dir
from gcvit_edge.targets.local import Timing, default_threads, time_artifacts

ROUNDS = 40
CALIBRATION_IMAGES = 128


def stock_onnx(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """torch.onnx.export, quant_pre_process and quantize_static with their defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            sample = next(self.samples, None)
            return None if sample is None else {"image": sample}

    paths = {precision: folder / f"stock.{precision}.onnx" for precision in ("float", "prepared", "int8")}
    example = (torch.from_numpy(images[0]),)
    torch.onnx.export(model, example, paths["float"], dynamo=True, input_names=["image"], output_names=["logits"], external_data=False)
    quant_pre_process(paths["float"], paths["prepared"], skip_symbolic_shape=True)
    quantize_static(paths["prepared"], paths["int8"], Reader())
    return [Artifact("onnx", "float", paths["float"], (paths["float"],)), Artifact("onnx", "int8", paths["int8"], (paths["int8"],))]


def stock_openvino(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """openvino.convert_model, and nncf.quantize as its guide says for transformers."""
    import nncf
    import openvino

    graph = openvino.convert_model(model, example_input=torch.from_numpy(images[0]), input=[1, *images[0].shape[1:]])
    quantized = nncf.quantize(graph, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    artifacts = []
    for precision, each in (("float", graph), ("int8", quantized)):
        path = folder / f"stock.{precision}.xml"
        openvino.save_model(each, path, compress_to_fp16=False)
        artifacts.append(Artifact("openvino", precision, path, (path, path.with_suffix(".bin"))))  # type: ignore[arg-type]
    return artifacts


def stock_executorch(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """PT2E static INT8 with XNNPACK's quantizer, lowered with the XNNPACK partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (torch.from_numpy(images[0]),)
    program = torch.export.export(model, example)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for image in images:
            prepared(torch.from_numpy(image))
    quantized = torch.export.export(convert_pt2e(prepared), example)
    artifacts = []
    for precision, each in (("float", program), ("int8", quantized)):
        path = folder / f"stock.{precision}.pte"
        path.write_bytes(to_edge_transform_and_lower(each, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
        artifacts.append(Artifact("executorch", precision, path, (path,)))  # type: ignore[arg-type]
    return artifacts


STOCK = {"executorch": stock_executorch, "onnx": stock_onnx, "openvino": stock_openvino}


def build(name: str, folder: Path, steps: Steps) -> list[tuple[str, Artifact]]:
    """(form, artifact) of both ways, float and INT8, in all runtimes."""
    import timm

    if name == SAMPLE_MODEL:
        model, info = load_model(str(sample_weights(name)))
    else:
        torch.manual_seed(0)  # speed does not depend on the weights
        model = create_model(name)
        info = describe_model(model)
    theirs = timm.create_model(name, num_classes=model.config.num_classes, img_size=model.config.img_size).eval()
    theirs.load_state_dict(model.state_dict())
    sample = find_images(resource_dir("calib") / "calib.zip", "calibration").select(CALIBRATION_IMAGES, 0)
    images = list(inputs(decode_images(sample, info.preprocessing, folder / "calib.npy"), info.preprocessing))
    ranges = observe(deploy(model, Form()), images)
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
    artifacts: list[tuple[str, Artifact]] = []
    for runtime in backend_names():
        with steps.step(f"{runtime}: stock"):
            artifacts += [("stock", artifact) for artifact in STOCK[runtime](theirs, images, folder)]
        with steps.step(f"{runtime}: ours"):
            artifacts.append(("ours", lower_float(runtime, model, info, folder)))
            artifacts.append(("ours", lower_quantized(runtime, model, info, recipe, ranges, folder)))
    return artifacts


def entry(form: str, artifact: Artifact, timing: Timing, stock: Timing) -> dict[str, Any]:
    """One line of the result; the speed-up's spread is over rounds: each round's median against the stock float one's."""
    size = len(timing.samples) // ROUNDS
    ours, base = (np.median(np.reshape(t.samples, (ROUNDS, size)), axis=1) for t in (timing, stock))
    low, middle, high = np.percentile(base / ours, [25, 50, 75])
    return {
        "runtime": artifact.backend,
        "form": form,
        "precision": artifact.precision,
        "p50_ms": round(timing.percentile(50), 3),
        "min_ms": round(min(timing.samples), 3),
        "speedup_vs_stock_float": round(float(middle), 3),
        "speedup_quartiles": [round(float(low), 3), round(float(high), 3)],
        "size_bytes": artifact.size_bytes,
        "load_ms": round(timing.load_ms, 1),
        "peak_rss_mb": round(timing.peak_rss_mb, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SAMPLE_MODEL)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps = Steps(Console(stderr=True))
    with tempfile.TemporaryDirectory() as folder:
        built = build(arguments.model, Path(folder), steps)
        side = describe_model(create_model(arguments.model)).preprocessing.size
        with steps.step("time", ROUNDS * len(built)) as advance:
            timings = time_artifacts([artifact for _, artifact in built], (1, 3, *side), arguments.threads, ROUNDS, advance)
        stock = {a.backend: t for (form, a), t in zip(built, timings, strict=True) if (form, a.precision) == ("stock", "float")}
        entries = [entry(form, a, t, stock[a.backend]) for (form, a), t in zip(built, timings, strict=True)]
    table = Table("runtime", "form", "precision", title=f"{arguments.model}, {cpu_name()}, {arguments.threads} threads, batch 1")
    for heading in ("ms p50", "min", "x stock float", "MB", "load ms", "peak MB"):
        table.add_column(heading, justify="right")
    for each in entries:
        low, high = each["speedup_quartiles"]
        table.add_row(
            each["runtime"], each["form"], each["precision"], f"{each['p50_ms']:.1f}", f"{each['min_ms']:.1f}",
            f"{each['speedup_vs_stock_float']:.2f} ({low:.2f}-{high:.2f})", f"{each['size_bytes'] / 1e6:.1f}", f"{each['load_ms']:.0f}",
            f"{each['peak_rss_mb']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
