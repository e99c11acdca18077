"""Tables and files of an analysis."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import EQUAL_DB
from gcvit_edge.paths import require_folder
from gcvit_edge.report.table import compact_table, epochs_table

JSON = "analysis.json"
SHOWN = 12


def analysis_tables(report: dict[str, Any]) -> list[RenderableType]:
    """What matters most of an analysis; each table fits 80 columns. The rest is in the JSON."""
    shown: list[RenderableType] = [epochs_table(report["training"]["epochs"])] if "training" in report else []
    for entry in report["backends"]:
        shown += [_layers(entry, report["images"]["sensitivity"]), _classes(entry), *_lines(entry)]
    return [*shown, _activations(report["activations"])]


def _table(title: str, *headings: str) -> Table:
    table = compact_table(title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")  # long names break
    return table


def _layers(entry: dict[str, Any], images: int) -> Table:
    table = _table(
        f"{entry['backend']}: the {SHOWN} layers of {len(entry['layers'])} that disturb the logits most, dB on {images} images",
        "layer", "alone", "without", "sim.", "real", "apart",
    )  # fmt: skip
    columns = ("alone_db", "without_db", "simulated_db", "deployed_db", "deployed_to_simulated_db")
    for layer in sorted(entry["layers"], key=lambda layer: layer["alone_db"])[:SHOWN]:
        name = f"{layer['layer']}{' (float)' if layer['kept_float'] else ''}"
        table.add_row(name, *(f"{layer[column]:.1f}" for column in columns))
    logits = entry["logits"]
    table.add_row("logits", "", "", *(f"{logits[c]:.1f}" for c in columns[2:]), style="bold")
    table.caption = (
        f"logits, if a layer alone is rounded, alone stays float (all rounded: {entry['all_rounded_db']:.1f});\n"
        "its output, all rounded: simulated, in the runtime, one against the other"
    )
    return table


def _classes(entry: dict[str, Any]) -> Table:
    drift, precision = entry["drift"], entry["precision"].upper()
    table = _table(f"{entry['backend']}: what classes lose", "class", "images", "float", precision, "lost", "won", "drop", "SQNR")
    for row in [{"class": "all", **drift["all"]}, *drift["classes"][:5]]:
        low, high = row["drop_ci95"]
        table.add_row(
            escape(row["class"]), str(row["images"]), f"{row['float_top1']:.2%}", f"{row['int8_top1']:.2%}", str(row["lost"]),
            str(row["won"]), f"{row['drop_points']:+.2f} ({low:+.2f} to {high:+.2f})", f"{row['sqnr_db']:.1f}",
        )  # fmt: skip
    return table


def _lines(entry: dict[str, Any]) -> list[str]:
    points = entry["pareto"]["frontier"]
    gain = next((point for point in points[1:] if point[2] is None or point[2] >= points[0][2] + 3), points[-1])
    named = ", ".join(entry["pareto"]["order"][: min(gain[0], 3)]) + (", ..." if gain[0] > 3 else "")
    close = entry["logits"]["with_taps_to_without_db"]
    plain = "" if entry["plain_ms"] == entry["int8_ms"] else f", with no layer in float {entry['plain_ms']:.1f}"
    return [
        f"{entry['backend']}: {entry['int8_ms']:.1f} ms{plain}, float {entry['float_ms']:.1f}. Half of the noise goes if {gain[0]} layers "
        f"stay float ({named}), for some {gain[1] - points[0][1]:+.2f} ms.",
        f"With the outputs of layers added, its logits are {'' if close >= EQUAL_DB else f'within {close:.1f} dB of '}the artifact's.",
    ]


def _activations(places: list[dict[str, Any]]) -> Table:
    table = _table(
        "Activations that 8 bits hold worst: a step, of the magnitude of the median channel",
        "place", "low", "high", "std", "past 6 std", "largest", "step",
    )  # fmt: skip
    for place in sorted(places, key=lambda place: -place["step_of_channel"])[:SHOWN]:
        table.add_row(
            place["place"], f"{place['low']:.2f}", f"{place['high']:.2f}", f"{place['std']:.3f}", f"{place['outliers']:.4%}",
            f"{place['imbalance']:.1f}x", f"{place['step_of_channel']:.3f}",
        )  # fmt: skip
    return table


def check_folder(folder: Path) -> None:
    """That an analysis can be written here; an earlier one is replaced.

    Raises:
        UserError: the folder holds something else, or matplotlib is missing.
    """
    require_folder(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / JSON).is_file())):
        raise UserError(f"{folder} exists and holds no analysis; give another --output")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib, which is not installed: pip install matplotlib; without --output there are none")


def write_analysis(report: dict[str, Any], folder: Path) -> list[str]:
    """Writes the JSON and the plots; gives the names of the files."""
    from gcvit_edge.report.plots import pareto_plot, ranges_plot, save, sensitivity_plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    names = [JSON, *save(ranges_plot(report), folder / "ranges")]
    for entry in report["backends"]:
        names += save(sensitivity_plot(report, entry), folder / f"sensitivity.{entry['backend']}")
        names += save(pareto_plot(report, entry), folder / f"pareto.{entry['backend']}")
    return names
