"""Ours against the stock way, in every runtime, interleaved in one run.

    pip install timm==1.0.31
    python benchmarks/vs_stock.py [--model gcvit_xxtiny] [--img-size 224] [--recipe int8_ptq] [--folder DIR] [--cpu NAME] [--json FILE]

Stock is what a user does without us (`stock.py`), ours what `gcvit-edge quantize` makes by a recipe. Both have the same weights, are
calibrated on the same images and timed on the same input: one fresh process an artifact, the same threads, in turn, so that a slow
minute of the machine hits all alike.

What is no integer is computed in float32 in every runtime. OpenVINO does that on all CPUs only if it is told to, so where it would choose
bfloat16 by itself its artifacts are timed in both ways, the second as "openvino bf16". Before it is timed, every artifact must give about
the logits of PyTorch: a fast wrong answer is no result.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _entries import save
from _random_network import random_network
from rich.console import Console
from rich.table import Table
from stock import STOCK, stock_made_by, stock_model

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import backend_names, load_backend
from gcvit_edge.cache import digest, sources
from gcvit_edge.cpus import default_threads, fastest_here
from gcvit_edge.data import decode_images, find_images, inputs
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.measurement.accuracy import finite_db, sqnr_db
from gcvit_edge.measurement.machine import cpu_name
from gcvit_edge.measurement.timing import QUICK, Timing, time_sessions
from gcvit_edge.model.create import create_model, describe_model, load_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.model.variants import variant_config
from gcvit_edge.plan import SAMPLE_MODEL, sample_weights
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text
from gcvit_edge.resources import resource_dir
from gcvit_edge.targets._process import LocalFolder, ProcessSession
from gcvit_edge.targets.local import Session

ROUNDS = 40
CALIBRATION_IMAGES = 16  # speed does not depend on them
MIN_SQNR_DB = 10.0  # stock INT8 has some 24 dB, a wrong kernel less than 5


def network(name: str, img_size: int | None) -> tuple[GCViT, ModelInfo]:
    """The sample's weights where they fit, else random ones: speed does not depend on them."""
    if name == SAMPLE_MODEL and img_size in (None, variant_config(name).img_size[0]):
        return load_model(str(sample_weights(name)))
    model = random_network(name, img_size)
    return model, describe_model(model)


def calibration_inputs(info: ModelInfo, folder: Path) -> list[np.ndarray]:
    """Network inputs (1, 3, H, W) of images of the sample; their pixels are decoded into `folder`."""
    sample = find_images(resource_dir("calib") / "calib.zip", "calibration").select(CALIBRATION_IMAGES, 0)
    return list(inputs(decode_images(sample, info.preprocessing, folder / "calib.npy"), info.preprocessing))


def build(
    name: str, img_size: int | None, recipe_name: str, folder: Path, steps: Steps, runtimes: Sequence[str]
) -> list[tuple[str, Artifact]]:
    """(form, artifact) of both ways, float and INT8, in these runtimes; what `folder` has already of this model, by the same sources,
    recipe and versions, is not built again."""
    model, info = network(name, img_size)
    state = digest([sources(), recipe_text(recipe_name), stock_made_by()])[:8]
    folder = folder / f"{name}-{model.config.img_size[0]}-{model.config.num_classes}-{state}"
    folder.mkdir(exist_ok=True)
    theirs = stock_model(name, model)
    images = calibration_inputs(info, folder)
    recipe = parse_recipe(recipe_text(recipe_name), recipe_name)

    @cache
    def calibrated() -> Calibrated:
        return calibrate(model, recipe, lambda: iter(images))

    def ours(runtime: str, place: Path) -> None:
        lower_float(runtime, model, info, place)
        lower_quantized(runtime, calibrated(), info, recipe, place)

    artifacts: list[tuple[str, Artifact]] = []
    for runtime in runtimes:
        ways: dict[str, Callable[[Path], object]] = {
            "stock": lambda place, runtime=runtime: STOCK[runtime](theirs, images, place),
            "ours": lambda place, runtime=runtime: ours(runtime, place),
        }
        for form, make in ways.items():
            place, unfinished = folder / f"{form}-{runtime}", folder / f"unfinished-{form}-{runtime}"
            if not place.exists():
                with steps.step(f"{runtime}: {form}"):
                    unfinished.mkdir(exist_ok=True)
                    make(unfinished)
                    unfinished.rename(place)
        artifacts += [(form, found(runtime, precision, folder / f"{form}-{runtime}")) for precision in ("float", "int8") for form in ways]
    return artifacts


def found(runtime: str, precision: str, folder: Path) -> Artifact:
    """The artifact that was written below `folder`."""
    suffix = Path(load_backend(runtime).ARTIFACT).suffix
    path = next(folder.rglob(f"*.{precision}{suffix}"))
    return Artifact(runtime, precision, path, (path, *path.parent.glob(f"*.{precision}.bin")))  # type: ignore[arg-type]


def macs(name: str, img_size: int | None) -> float:
    """Multiply-accumulates of one image, of the published network."""
    from torch.utils.flop_counter import FlopCounterMode

    model = create_model(name, img_size=img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *model.config.img_size))
    return counter.get_total_flops() / 2


def integer_peak(threads: int) -> float | None:
    """INT8 multiply-accumulates a second, the fastest of 20 times of a large matrix product in OpenVINO, as a linear and as a 1x1
    convolution, of which the faster one depends on the CPU; None if neither is in INT8."""
    import openvino
    from openvino import opset15 as ops

    size = 2048
    x = ops.parameter([size, size], np.float32)
    limits = [ops.constant(np.float32(v)) for v in (-1, 1, -1, 1)]
    rounded = ops.fake_quantize(x, *limits, 256)

    def weight(*shape: int) -> "openvino.Node":
        return ops.multiply(ops.convert(ops.constant(np.full(shape, 3, np.int8)), "f32"), ops.constant(np.float32(0.01)))

    column = ops.transpose(ops.reshape(rounded, ops.constant([1, size, 1, size]), False), ops.constant([0, 3, 1, 2]))
    ways = [
        ops.matmul(rounded, weight(size, size), False, True),
        ops.convolution(column, weight(size, size, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1]),
    ]
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    data, best = np.zeros((size, size), np.float32), float("inf")
    for product in ways:
        request = openvino.Core().compile_model(openvino.Model([product], [x]), "CPU", options).create_infer_request()
        for _ in range(20):
            request.infer([data])
            integer = [node for node in request.profiling_info if node.exec_type.lower().endswith("i8")]
            best = min(best, max((node.real_time.total_seconds() for node in integer), default=best))  # else a reshape of bytes
    return size**3 / best if best < float("inf") else None


class DefaultPrecision(ProcessSession):
    """An OpenVINO artifact in the precision that OpenVINO chooses."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        cpus = fastest_here()
        pinned = ",".join(map(str, cpus[:threads])) if threads < len(cpus) else ""
        worker = Path(__file__).with_name("_openvino_defaults.py")
        super().__init__(artifact, [sys.executable, str(worker), str(artifact.path.resolve()), str(threads), pinned], LocalFolder())


def chooses_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU, unless it is told not to."""
    import openvino

    return openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16


def time_built(
    built: Sequence[tuple[str, Artifact]], model: GCViT, image: np.ndarray, threads: int, steps: Steps
) -> list[tuple[str, str, Artifact, Timing, float]]:
    """(runtime, form, artifact, timing, SQNR of its logits against PyTorch's in dB) of all, in turn, on `image` (1, 3, H, W)."""
    again = [each for each in built if each[1].backend == "openvino"] if chooses_bfloat16() else []
    names = [artifact.backend for _, artifact in built] + ["openvino bf16"] * len(again)
    with torch.no_grad():
        expected = model(torch.from_numpy(image)).numpy()
    with ExitStack() as stack, steps.step("time", ROUNDS * len(names), timed=True) as advance:
        sessions = [stack.enter_context(Session(artifact, threads, pinned=True)) for _, artifact in built]
        sessions += [stack.enter_context(DefaultPrecision(artifact, threads)) for _, artifact in again]
        parities = [sqnr_db(session.infer(image, lambda: None), expected) for session in sessions]
        for name, (form, artifact), parity in zip(names, [*built, *again], parities, strict=True):
            if not parity > MIN_SQNR_DB:
                raise SystemExit(f"{form} {artifact.precision} in {name} gives other logits than PyTorch: {parity:.1f} dB")
        timings = time_sessions(sessions, image, threads, QUICK.with_turns(ROUNDS), advance)
    return [(name, *each, *more) for name, each, *more in zip(names, [*built, *again], timings, parities, strict=True)]


def entry(runtime: str, form: str, artifact: Artifact, timing: Timing, parity: float, stock: Timing) -> dict[str, Any]:
    """One line of the result; the speed-up's spread is over rounds: each round's median against the stock float one's."""
    size = len(timing.samples) // ROUNDS
    ours, base = (np.median(np.reshape(t.samples, (ROUNDS, size)), axis=1) for t in (timing, stock))
    low, middle, high = np.percentile(base / ours, [25, 50, 75])
    return {
        "runtime": runtime,
        "form": form,
        "precision": artifact.precision,
        "p50_ms": round(timing.percentile(50), 3),
        "min_ms": round(min(timing.samples), 3),
        "speedup_vs_stock_float": round(float(middle), 3),
        "speedup_quartiles": [round(float(low), 3), round(float(high), 3)],
        "size_bytes": artifact.size_bytes,
        "load_ms": round(timing.load_ms, 1),
        "peak_rss_mb": round(timing.peak_rss_mb, 1),
        "sqnr_db": round(finite_db(parity), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SAMPLE_MODEL)
    parser.add_argument("--img-size", type=int, help="(default: the variant's)")
    parser.add_argument("--recipe", default="int8_ptq", help="of ours (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the artifacts there, and use what is there already")
    parser.add_argument("--build-only", action="store_true", help="build into --folder, and time nothing")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--cpu", default=cpu_name(), help="its name in the table (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.build_only and not arguments.folder:
        parser.error("--build-only needs the --folder to build into")
    steps = Steps(Console(stderr=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        built = build(arguments.model, arguments.img_size, arguments.recipe, folder, steps, backend_names())
        if arguments.build_only:
            return
        model, info = network(arguments.model, arguments.img_size)
        timed = time_built(built, model, calibration_inputs(info, folder)[0], arguments.threads, steps)
        work, peak = macs(arguments.model, arguments.img_size), integer_peak(arguments.threads)
        stock = {runtime: timing for runtime, form, artifact, timing, _ in timed if (form, artifact.precision) == ("stock", "float")}
        what = {
            "model": arguments.model, "img_size": list(model.config.img_size), "recipe": arguments.recipe, "cpu": arguments.cpu,
            "threads": arguments.threads, "gmac": round(work / 1e9, 3), "integer_gmac_per_s": peak and round(peak / 1e9, 1),
            "floor_ms": peak and round(1000 * work / peak, 3),
        }  # fmt: skip
        entries = [what | entry(*each, stock[each[0]]) for each in timed]
    if arguments.json:
        save(entries, arguments.json)
    table = Table("runtime", "form", "precision", title=f"{arguments.model}, {arguments.cpu}, {arguments.threads} threads, batch 1")
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
    if what["floor_ms"] is None:
        print(f"{what['gmac']:.2f} GMAC; what integer units can do is not known: OpenVINO has no INT8 product on this CPU")
        return
    floor, best = what["floor_ms"], min(each["p50_ms"] for each in entries if each["precision"] == "int8")
    seen = f"{what['gmac']:.2f} GMAC; integer units were seen at {what['integer_gmac_per_s']:.0f} GMAC/s"
    print(f"{seen}: the floor is {floor:.1f} ms, the fastest INT8 artifact takes {best / floor:.1f} times that")


if __name__ == "__main__":
    main()
