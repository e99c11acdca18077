"""The picture of README.md: ours against the stock way."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED = ("gcvit_xxtiny", "gcvit_base")
RUNTIMES = {"executorch": "ExecuTorch", "openvino": "OpenVINO", "onnx": "ONNX Runtime"}
BARS = {  # grey: the stock way, blue: ours
    ("stock", "float"): ("stock float", "#cccccc"),
    ("stock", "int8"): ("stock INT8", "#8a8a8a"),
    ("ours", "float"): ("our float", "#9ecae1"),
    ("ours", "int8"): ("our INT8", "#2166ac"),
}


def stock_picture(measured: Sequence[list[dict[str, Any]]]) -> "Figure":
    """Bars of the median latency at 224 px: a column for each model, a row for each CPU that ran them all; above INT8 how much faster than
    stock float. measured: the entries of each run."""
    from matplotlib.figure import Figure

    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in measured:
        if run[0]["img_size"] == [224, 224]:
            runs.setdefault((run[0]["model"], run[0]["cpu"]), []).extend(run)
    cpus = sorted(cpu for cpu in {cpu for _, cpu in runs} if all((model, cpu) in runs for model in PICTURED))
    if not cpus:
        raise SystemExit(f"results/vs_stock has no CPU that ran all of {', '.join(PICTURED)}, which the picture shows")
    figure = Figure(figsize=(10, 0.4 + 2.1 * len(cpus)), layout="constrained")
    grid = figure.subplots(len(cpus), len(PICTURED), squeeze=False, sharey="col")
    for axes, (cpu, model) in zip(grid.flat, product(cpus, PICTURED), strict=True):
        entries = {(entry["runtime"], entry["form"], entry["precision"]): entry for entry in runs[model, cpu]}
        for place, (key, (label, color)) in enumerate(BARS.items()):
            bars = [entries[runtime, *key] for runtime in RUNTIMES]
            at = [group + 0.2 * (place - 1.5) for group in range(len(bars))]
            axes.bar(at, [bar["p50_ms"] for bar in bars], width=0.19, color=color, label=label)
            for x, bar in zip(at, bars, strict=True):
                if key[1] == "int8":
                    axes.text(x, bar["p50_ms"], f"{bar['speedup_vs_stock_float']:.1f}x", ha="center", va="bottom", fontsize=8)
        axes.set_title(f"{model}, {cpu.replace('(R)', '').removesuffix(' Processor')}", fontsize=10, loc="left")
        axes.set_xticks(range(len(RUNTIMES)), list(RUNTIMES.values()))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms, median")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(BARS), frameon=False, fontsize=9)
    return figure


def save_picture(figure: "Figure", file: Path) -> None:
    """Writes an SVG, the same to the byte for the same results."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None})
