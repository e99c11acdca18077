"""Writes the tables of README.md and docs/, and the picture, from reports.

    gcvit-edge quantize --recipe int8_ptq --output demo && cp demo/report.json results/fashion_mnist.json
    python benchmarks/vs_stock.py --cpu "AMD EPYC (Zen 5)" --json results/vs_stock/gcvit_xxtiny_zen5.json
    python benchmarks/arm_counts.py --json results/arm_counts/gcvit_xxtiny.json
    python benchmarks/accuracy.py --weights FILE --train DIR --eval DIR --json results/accuracy/tiny_imagenet.json
    gcvit-edge quantize --recipe int8_qat ... --output qat && cp qat/report.json results/qat/tiny_imagenet.json
    gcvit-edge quantize --recipe int8_auto --max-drop 0.15 ... --output auto && cp auto/report.json results/auto/tiny_imagenet.json
    python scripts/update_results.py

Each results/NAME.json, results/qat/NAME.json and results/auto/NAME.json is the report.json of one run; the table has one row an
artifact. Each results/vs_stock/MODEL_CPU.json, results/arm_counts/MODEL.json and results/accuracy/NAME.json is what that benchmark
wrote; the tables have one row a runtime, one a file on an emulated CPU, and one an artifact. The picture, results/vs_stock.svg, shows
GC ViT-XXT and B of results/vs_stock; it needs matplotlib.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from _picture import RUNTIMES, save_picture, stock_picture

ROOT = Path(__file__).parent.parent


def header(*names: str, numbers: str) -> str:
    """The first two lines of a table: `names`, and then the columns of `numbers`, separated by " | ", to the right."""
    of_numbers = numbers.split(" | ")
    return f"| {' | '.join([*names, *of_numbers])} |\n| {' | '.join(['---'] * len(names) + ['---:'] * len(of_numbers))} |"


def drop(entry: dict[str, Any]) -> str:
    """The drop in points and its interval."""
    low, high = entry["drop_ci95"]
    return f"{entry['drop_points']:+.2f} ({low:+.2f} to {high:+.2f})"


def agreement(entry: dict[str, Any]) -> str:
    """Agreement with float and its interval."""
    low, high = entry["agreement_ci95"]
    return f"{entry['agreement']:.2%} ({100 * low:.2f} to {100 * high:.2f})"


def sqnr(entry: dict[str, Any]) -> str:
    """SQNR of the logits in dB and half of its interval, which is as far on both sides."""
    low, high = entry["sqnr_ci95"]
    return f"{entry['sqnr_db']:.1f} ± {(high - low) / 2:.2f}"


RESULTS_HEADER = header(
    "images", "runtime",
    numbers="top-1 float | drop, points | agreement | SQNR, dB | MB, INT8 of float | ms, INT8 of float | speed-up",
)  # fmt: skip


def rows(name: str, report: dict[str, Any]) -> list[str]:
    """Table rows of one report."""
    out = []
    for entry in report["artifacts"]:
        mark = " (noisy)" if entry["noisy"] or entry["float_noisy"] else ""
        out.append(
            f"| {name}, {report['images']:,} | {entry['backend']} | {report['float']['top1']:.2%} | "
            f"{drop(entry)} | {agreement(entry)} | {sqnr(entry)} | "
            f"{entry['size_bytes'] / 1e6:.1f} of {entry['float_size_bytes'] / 1e6:.1f} | "
            f"{entry['latency_ms']['p50']:.1f} of {entry['float_latency_ms']['p50']:.1f}{mark} | {entry['speedup']:.2f}x |"
        )
    return out


def results_table() -> str:
    """INT8 of the default recipe against our float."""
    reports = {path.stem.replace("_", " "): json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))}
    machines = sorted({f"{report['machine']['cpu']}, {report['machine']['threads']} threads" for report in reports.values()})
    if len(machines) > 1:
        raise SystemExit(f"results/*.json are of {' and '.join(machines)}, whose times do not belong into one table; measure all on one")
    lines = [row for name, report in reports.items() for row in rows(name, report)]
    note = (
        f"GC ViT-XXT, `int8_ptq`, {machines[0]}, batch 1, medians. Every figure is read off the INT8 "
        "artifact in its own runtime, against our float artifact on the same images in the same run. In brackets, after ±: 95 % intervals."
    )
    return "\n".join([note, "", RESULTS_HEADER, *lines])


STOCK_HEADER = header("model", "runtime", numbers="stock float | stock INT8 | our float | our INT8 | MB, INT8 of float")


def stock_runs() -> list[list[dict[str, Any]]]:
    """The entries of every run against the stock way."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results" / "vs_stock").glob("*.json"))]


def stock_table() -> str:
    """Ours against the stock way, a table for each CPU."""
    runs = stock_runs()
    parts = []
    for cpu in sorted({run[0]["cpu"] for run in runs}):
        here = [run for run in runs if run[0]["cpu"] == cpu]
        ways = sorted({f"`{entry['recipe']}`, {entry['threads']} threads" for run in here for entry in run})
        if len(ways) > 1:
            raise SystemExit(f"results/vs_stock/*.json of {cpu} are of {' and '.join(ways)}; measure all in one way")
        fastest: dict[str, float] = {}  # by model, for the order: the smallest first
        for entry in (entry for run in here for entry in run):
            fastest[entry["model"]] = min(entry["p50_ms"], fastest.get(entry["model"], entry["p50_ms"]))
        here.sort(key=lambda run: (run[0]["img_size"], fastest[run[0]["model"]], run[0]["runtime"]))
        parts += [
            "",
            f"{cpu}, {ways[0]}, batch 1:",
            "",
            STOCK_HEADER,
            *(row for run in here for row in stock_rows(run)),
        ]
    return "\n".join(parts[1:])


def stock_rows(entries: list[dict[str, Any]]) -> list[str]:
    """One row a runtime."""
    rows = []
    for runtime in dict.fromkeys(entry["runtime"] for entry in entries):
        by = {(entry["form"], entry["precision"]): entry for entry in entries if entry["runtime"] == runtime}
        cells = [
            f"{by[key]['p50_ms']:.1f} ms" + (f", {by[key]['speedup_vs_stock_float']:.2f}x" if key != ("stock", "float") else "")
            for key in (("stock", "float"), ("stock", "int8"), ("ours", "float"), ("ours", "int8"))
        ]
        sizes = f"{by['ours', 'int8']['size_bytes'] / 1e6:.1f} of {by['ours', 'float']['size_bytes'] / 1e6:.1f}"
        rows.append(f"| {entries[0]['model']}, {entries[0]['img_size'][0]} px | {runtime} | {' | '.join(cells)} | {sizes} |")
    return rows


SIZES = {"gcvit_xxtiny": "XXT", "gcvit_tiny": "T", "gcvit_small": "S", "gcvit_base": "B"}


def growth_table() -> str:
    """How cost grows with the size of the model, and how near the fastest artifact is to the machine's floor (which older runs do not
    say)."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by CPU and model; float32 alone, in which every CPU ran
    for run in stock_runs():
        if run[0]["img_size"] == [224, 224] and run[0]["model"] in SIZES and not run[0]["runtime"].endswith("bf16"):
            runs.setdefault(run[0]["cpu"], {})[run[0]["model"]] = run
    gmac = {model: run[0]["gmac"] for here in runs.values() for model, run in here.items() if "gmac" in run[0]}
    products = " / ".join(f"{gmac[model] / gmac['gcvit_xxtiny']:.2f}" for model in list(SIZES)[1:])
    lines = [f"| multiplications ({', '.join(f'{gmac[model]:.2f}' for model in SIZES)} GMAC) |{f' {products} |' * len(RUNTIMES)} | |"]
    for cpu, here in sorted(runs.items()):
        models = [model for model in SIZES if model in here]
        ours = {
            (model, entry["runtime"]): entry["p50_ms"]
            for model in models for entry in here[model] if (entry["form"], entry["precision"]) == ("ours", "int8")
        }  # fmt: skip
        cells = [" / ".join(f"{ours[model, each] / ours['gcvit_xxtiny', each]:.1f}" for model in models[1:]) for each in RUNTIMES]
        floor = {model: here[model][0]["floor_ms"] for model in models if "floor_ms" in here[model][0]}
        floors = " / ".join(f"{ms:.1f}" for ms in floor.values())
        nearest = " / ".join(f"{min(entry['p50_ms'] for entry in here[model]) / ms:.1f}" for model, ms in floor.items())
        lines.append(f"| {cpu}: {', '.join(SIZES[model] for model in models[1:])} | {' | '.join([*cells, floors, nearest])} |")
    heads = header(
        "INT8's time, as a multiple of XXT's",
        numbers=f"{' | '.join(RUNTIMES.values())} | floor, ms: XXT and these | fastest artifact, floors",
    )  # fmt: skip
    return "\n".join([heads, *lines])


ARM_HEADER = header("model", "CPU", "file", numbers="all | SDOT | SMMLA | FMLA | of our float | SQNR to x86, dB")
ARM_FILES = {  # in the order of the table
    ("stock", "float"): "stock float",
    ("stock", "int8"): "stock INT8",
    ("ours", "float"): "our float",
    ("ours", "int8"): "our INT8",
    ("int8_ptq_full", "int8"): "our INT8, `int8_ptq_full`",
}


def arm_table() -> str:
    """Millions of instructions on ARM."""
    lines = []
    for path in sorted((ROOT / "results" / "arm_counts").glob("*.json")):
        entries = json.loads(path.read_text())
        by = {(each["cpu"], each["form"], each["precision"]): each for each in entries}
        for cpu, (key, file) in product(sorted({each["cpu"] for each in entries}), ARM_FILES.items()):
            each = by[cpu, *key]
            counts = " | ".join(f"{each[name] / 1e6:.1f}" if each[name] else "0" for name in ("instructions", "sdot", "smmla", "fmla"))
            share = each["instructions"] / by[cpu, "ours", "float"]["instructions"]
            lines.append(f"| {path.stem} | `{cpu.split()[0]}` | {file} | {counts} | {share:.2f}x | {each['sqnr_db']:.0f} |")
    return "\n".join([ARM_HEADER, *lines])


ACCURACY_HEADER = header(
    "recipe", "runtime",
    numbers="images | top-1 | drop, points | agreement | SQNR, dB | agreement with the other runtimes | MB",
)  # fmt: skip


def accuracy_table() -> str:
    """Recipes, and folded the ablation."""
    recipes, ablation = [], []
    for path in sorted((ROOT / "results" / "accuracy").glob("*.json")):
        for each in json.loads(path.read_text()):
            cross = "" if each["cross"] is None else f"{each['cross']:.2%}"
            (ablation if "," in each["row"] else recipes).append(
                f"| {each['row']} | {each['backend']} | {each['images']:,} | {each['top1']:.2%} | "
                f"{drop(each)} | {agreement(each)} | {sqnr(each)} | {cross} | {each['size_bytes'] / 1e6:.1f} |"
            )
    fold = "<details>\n<summary>The ablation: one algorithm changed at a time</summary>\n"
    return "\n".join([ACCURACY_HEADER, *recipes, "", fold, ACCURACY_HEADER, *ablation, "\n</details>"])


QAT_HEADER = header("images", "runtime", numbers="top-1 float | top-1 INT8 | drop, points | agreement | SQNR, dB")


def qat_table() -> str:
    """What `int8_qat` gave, and how it was trained. Its artifacts are as fast as those of `int8_ptq`."""
    reports = {path.stem.replace("_", " "): json.loads(path.read_text()) for path in sorted((ROOT / "results" / "qat").glob("*.json"))}
    lines, notes = [], []
    for name, report in reports.items():
        for entry in report["artifacts"]:
            lines.append(
                f"| {name}, {report['images']:,} | {entry['backend']} | {report['float']['top1']:.2%} | {entry['top1']:.2%} | "
                f"{drop(entry)} | {agreement(entry)} | {sqnr(entry)} |"
            )
        training = report["training"]
        losses = ", ".join(f"{epoch['loss']:.4g}" for epoch in training["epochs"])
        notes.append(f"{name}: {training['images']:,} images, loss by epoch {losses}")
    return "\n".join([QAT_HEADER, *lines, "", f"Training: {'; '.join(notes)}."])


AUTO_HEADER = header(
    "images", "runtime", "layers in float: found / safe choice",
    numbers="drop, points | agreement | SQNR, dB | ms: `int8_ptq` / found / safe choice / float",
)  # fmt: skip


def auto_table() -> str:
    """What `int8_auto` found."""
    lines = []
    for path in sorted((ROOT / "results" / "auto").glob("*.json")):
        report = json.loads(path.read_text())
        name = f"{path.stem.replace('_', ' ')}, {report['images']:,}, limit {report['limits']['max_drop']:g}"
        for entry in report["artifacts"]:
            found, latency = entry["search"], entry["search"]["latency_ms"]
            if latency is None:
                layers, times = "none: `int8_ptq` is within it", ""
            else:
                layers = f"{len(found['found'])} / {len(found['safe_choice'])}"
                times = " / ".join(f"{latency[kind]:.1f}" for kind in ("plain", "chosen", "safe", "float"))
            lines.append(f"| {name} | {entry['backend']} | {layers} | {drop(entry)} | {agreement(entry)} | {sqnr(entry)} | {times} |")
    return "\n".join([AUTO_HEADER, *lines])


TABLES: dict[str, dict[str, Callable[[], str]]] = {  # by page, by the name in the markers around it
    "README.md": {
        "results": results_table, "vs_stock": stock_table, "accuracy": accuracy_table, "arm_counts": arm_table, "qat": qat_table,
    },
    "docs/results.md": {"growth": growth_table},
    "docs/quantization.md": {"auto": auto_table},
}  # fmt: skip


def updated(page: str) -> str:
    """The text of a page with all its tables made anew."""
    text = (ROOT / page).read_text()
    for name, table in TABLES[page].items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text = text[: text.index(begin) + len(begin)] + table() + text[text.index(end) :]
    return text


def main() -> None:
    """Makes everything before it writes anything, since any of it may be refused."""
    pages, picture = {page: updated(page) for page in TABLES}, stock_picture(stock_runs())
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    save_picture(picture, ROOT / "results" / "vs_stock.svg")


if __name__ == "__main__":
    main()
