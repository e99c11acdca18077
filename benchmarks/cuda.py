"""GC ViT in PyTorch on an NVIDIA GPU: float forms, INT8 and FP8, by batch.

    python benchmarks/cuda.py [--models gcvit_xxtiny ...] [--batches 1 32 256] [--ways NAME ...] [--device cuda:0] [--json FILE]

A way is what `gcvit-edge benchmark --target cuda` calls one, in an arithmetic: `float32 eager`, `bfloat16 compiled-graphs`, `bfloat16 fp8`.
Every configuration is a process of its own, since compiling takes minutes, and its line is printed as soon as it is known; what --json has
already, right, of this GPU, this code and these versions, is not measured again, so a run that was cut off goes on. Weights are random:
speed does not depend on them. Images are on the GPU already. Answers are compared with those of the same network in float32, and are a
failure below the floor of their arithmetic.

PyTorch need not be the pinned version; INT8 needs torchao, FP8 a GPU of compute capability 8.9.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from _entries import save
from rich.console import Console
from rich.table import Table

from gcvit_edge.cache import digest, sources
from gcvit_edge.errors import unknown_name

MODELS = ("gcvit_xxtiny", "gcvit_tiny", "gcvit_small", "gcvit_base")
WAYS = (
    *(f"{dtype} {way}" for dtype in ("float32", "float16", "bfloat16") for way in ("eager", "compiled-graphs")),
    *(f"bfloat16 {way}" for way in ("graphs", "int8", "fp8")),
)
TIMEOUT_S = 1800  # of a configuration, of which compiling takes minutes
BASE = "bfloat16 compiled-graphs"  # what INT8 and FP8 are to beat


def configuration(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What tells an entry from others."""
    return tuple(entry[key] for key in ("device", "torch", "model", "batch", "way"))


def measure(model: str, batch: int, way: str, device: str) -> dict[str, Any]:
    """The entry of one configuration, from a process of its own; it has "error" where that fails."""
    command = [sys.executable, str(Path(__file__).with_name("_cuda_case.py")), model, str(batch), way, device]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {TIMEOUT_S} s"}
    if ran.returncode < 0:
        return {"error": f"ended by {signal.Signals(-ran.returncode).name}"}
    if ran.returncode != 0:
        return {"error": reason(ran.stderr) or f"exit code {ran.returncode}"}
    return json.loads(ran.stdout.splitlines()[-1])


def reason(stderr: str) -> str:
    """The line of a traceback that says what was wrong: the last one that starts with an error, after which PyTorch's have advice."""
    lines = [each for each in stderr.splitlines() if each.strip()]
    errors = [each for each in lines if re.match(r"[\w.]+(Error|Exception|Unsupported|Failed)\b", each)]
    return (errors or lines or [""])[-1][:300]


def line(entry: dict[str, Any]) -> str:
    """What is printed of an entry as soon as it is known."""
    head = f"{entry['model']}, batch {entry['batch']}, {entry['way']}: "
    if "error" in entry:
        return head + f"failed: {entry['error']}"
    return head + (
        f"{entry['p50_ms']:.3f} ms ({entry['min_ms']:.3f} at least), {entry['images_per_s']:.0f} images/s, {entry['sqnr_db']:.1f} dB, "
        f"{entry['peak_memory_mb']} MB, ready in {entry['ready_s']:.0f} s" + ("" if entry["passed"] else "; WRONG ANSWER")
    )


def show(entries: list[dict[str, Any]]) -> Table:
    """The table: a line for each model and way, a column for each batch, each with its ratio to `BASE`."""
    batches = sorted({each["batch"] for each in entries})
    first = entries[0]
    table = Table("model", "way", title=f"{first['device']}, PyTorch {first['torch']}: ms, and how many times as fast as {BASE}")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    known = {(each["model"], each["way"], each["batch"]): each for each in entries if "error" not in each}
    for model, way in dict.fromkeys((each["model"], each["way"]) for each in entries):
        cells = []
        for batch in batches:
            each, base = known.get((model, way, batch)), known.get((model, BASE, batch))
            ratio = f", {base['p50_ms'] / each['p50_ms']:.2f}x" if each and base else ""
            cells.append(f"{each['p50_ms']:.3f}{ratio}" if each else "-")
        table.add_row(model, way, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 32, 256))
    parser.add_argument("--ways", nargs="+", default=WAYS, help=f"of {', '.join(map(repr, WAYS))}")
    parser.add_argument("--device", default="cuda:0", help="as PyTorch calls it; on cpu all but CUDA graphs runs, which is for tests")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for way in arguments.ways:
        if way not in WAYS:
            raise SystemExit(f"--ways: {unknown_name('way', way, WAYS)}")
    place, made = measured_on(arguments.device), made_by()
    saved = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    entries, asked = {configuration(each): each for each in saved}, []
    for model, batch, way in product(arguments.models, arguments.batches, arguments.ways):
        what = place | {"model": model, "batch": batch, "way": way}
        key = configuration(what)
        asked.append(key)
        if key in entries and entries[key].get("passed") and entries[key].get("made_by") == made:
            continue
        entries[key] = what | measure(model, batch, way, arguments.device) | {"made_by": made}
        print(line(entries[key]), flush=True)
        if arguments.json:
            save(list(entries.values()), arguments.json)
    here = [each for each in entries.values() if all(each[key] == value for key, value in place.items())]
    Console(width=140).print(show(here))
    if not all(entries[key].get("passed") for key in asked):
        raise SystemExit(1)


def measured_on(device: str) -> dict[str, str]:
    """The GPU and the version of PyTorch."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no GPU; see `gcvit-edge doctor`")
    return {"device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu", "torch": torch.__version__}


def made_by() -> str:
    """Digest of what decides an entry besides its configuration: our code, and the version of torchao."""
    torchao = version("torchao") if find_spec("torchao") else ""
    programs = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("_cuda_case", "_random_network"))
    return digest([sources(), *programs, torchao])[:16]


if __name__ == "__main__":
    main()
