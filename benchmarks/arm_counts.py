"""What one inference costs on 64-bit ARM, in instructions: stock and ours, float and INT8, in ExecuTorch; ours by `int8_ptq_full` too.

    pip install timm==1.0.31
    python benchmarks/arm_counts.py [--model gcvit_xxtiny] [--folder DIR] [--json FILE]

The other files are those of `vs_stock.py`. All are counted as `--target arm64 --count` does: by a plugin of QEMU, one thread, the
difference of two inferences and one. The answer of each file there must be the one that it gives on this machine.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _entries import save
from rich.console import Console
from rich.table import Table
from stock import stock_made_by
from vs_stock import build, calibration_inputs, found, network

from gcvit_edge.artifact import Artifact
from gcvit_edge.cache import digest, sources
from gcvit_edge.errors import CheckFailed
from gcvit_edge.lower import lower_quantized
from gcvit_edge.measurement.parity import check_parity
from gcvit_edge.native.build import executorch_package
from gcvit_edge.plan import SAMPLE_MODEL
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text
from gcvit_edge.targets import Case
from gcvit_edge.targets.arm64 import Options, connect
from gcvit_edge.targets.local import Session

CPUS = ("cortex-a76", "max")  # dot products; matrix products
FULL = "int8_ptq_full"


def build_full(name: str, folder: Path, steps: Steps) -> Artifact:
    """Ours by the recipe `FULL`; not built again if `folder` has it, by the same sources, recipe and ExecuTorch."""
    state = digest([sources(), recipe_text(FULL), stock_made_by()])[:8]
    output = folder / f"{name}-{FULL}-{state}"
    if not output.exists():
        with steps.step(f"our {FULL}"):
            model, info = network(name, None)
            images, recipe = calibration_inputs(info, folder), parse_recipe(recipe_text(FULL), FULL)
            unfinished = folder / f"unfinished-{FULL}"
            lower_quantized("executorch", calibrate(model, recipe, lambda: iter(images)), info, recipe, unfinished)
            unfinished.rename(output)
    return found("executorch", "int8", output)


def preload_kernels() -> None:
    """Lets QEMU load ExecuTorch's kernels beside the runner, which has none: what the stock way leaves outside of XNNPACK needs them."""
    libraries = executorch_package("aarch64") / "lib"
    kernels = (libraries / f"libexecutorch_kernels_{kind}.so" for kind in ("optimized", "quantized"))
    os.environ["QEMU_SET_ENV"] = "LD_PRELOAD=" + ":".join(map(str, kernels))


def count(form: str, artifact: Artifact, cpu: str, image: np.ndarray, here: np.ndarray) -> dict[str, Any]:
    """One line of the result. image: the network input (1, C, H, W). here: its logits (1, classes) on this machine.

    Raises:
        CheckFailed: the file does not run, or gives another answer there.
    """
    with connect("", Options(cpu=cpu, count=True)) as arm, arm.open(Case(artifact, "cpu"), 1, pinned=False) as session:
        parity = check_parity(session.infer(image, lambda: None), here, artifact.precision)
        if not parity.passed:
            raise CheckFailed(f"{form} {artifact.name} on {cpu}: the answer is that of this machine only {parity.describe()}")
        counts = {name: int(number) for name, number in session.counts(image).items()}
        return {"cpu": arm.machine().cpu, "form": form, "precision": artifact.precision, **counts, "sqnr_db": round(parity.sqnr_db, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SAMPLE_MODEL)
    parser.add_argument("--folder", type=Path, help="keep the artifacts there, and use what is there already")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    preload_kernels()
    steps, entries = Steps(Console(stderr=True)), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        built = build(arguments.model, None, "int8_ptq", folder, steps, ["executorch"])
        built.append((FULL, build_full(arguments.model, folder, steps)))
        image = calibration_inputs(network(arguments.model, None)[1], folder)[0]
        with steps.step("count", len(CPUS) * len(built)) as advance:
            for form, artifact in built:
                with Session(artifact, 1) as session:
                    here = session.infer(image, lambda: None)
                for cpu in CPUS:
                    entries.append(count(form, artifact, cpu, image, here))
                    advance()
    table = Table("CPU", "form", "precision", title=f"{arguments.model}: millions of instructions of one inference")
    for heading in ("all", "SDOT", "SMMLA", "FMLA", "SQNR"):
        table.add_column(heading, justify="right")
    for each in entries:
        numbers = [f"{each[name] / 1e6:.1f}" for name in ("instructions", "sdot", "smmla", "fmla")]
        table.add_row(each["cpu"], each["form"], each["precision"], *numbers, f"{each['sqnr_db']:.1f} dB")
    Console(width=120).print(table)
    if arguments.json:
        save(entries, arguments.json)


if __name__ == "__main__":
    main()
