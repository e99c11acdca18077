"""Plots of an analysis, as matplotlib figures. No window is opened: figures are made without pyplot."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 25
SHOWN_DB = 30
BLUE, ORANGE, GREY, RED = "#2166ac", "#e08214", "#9a9a9a", "#b2182b"


def save(figure: "Figure", stem: Path) -> list[str]:
    """Writes the figure as .png and .svg; gives the names of the files."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    return [file.name for file in files]


def sensitivity_plot(report: dict[str, Any], entry: dict[str, Any]) -> "Figure":
    """Bars: the share of the noise that each layer adds, of the layers that add most, and what the logits gain if it stays float."""
    layers = sorted(entry["layers"], key=lambda layer: layer["alone_db"])
    total = sum(10 ** (-layer["alone_db"] / 10) for layer in layers)
    shown = layers[:SHOWN][::-1]
    figure, (left, right) = _axes(2, height=0.27 * len(shown) + 1.6)
    names = [layer["layer"] for layer in shown]
    shares = [100 * 10 ** (-layer["alone_db"] / 10) / total for layer in shown]
    left.barh(names, shares, color=[GREY if layer["kept_float"] else BLUE for layer in shown])
    left.set_xlabel("share of the noise when rounded alone, %")
    for name, share, layer in zip(names, shares, shown, strict=True):
        left.text(share, name, f" {layer['alone_db']:.1f} dB", va="center", fontsize=7)
    left.set_xlim(0, 1.2 * max(shares))
    everything = entry["all_rounded_db"]
    values = [layer["without_db"] for layer in shown]
    right.hlines(names, [everything] * len(values), values, color=ORANGE, linewidth=2)
    right.plot(values, names, "o", color=ORANGE, markersize=5)
    right.axvline(everything, color=RED, linewidth=1)
    right.text(everything, len(names) - 0.4, f" all rounded: {everything:.1f} dB", color=RED, fontsize=7, ha="left", va="bottom")
    right.set_yticks([])
    for axes in (left, right):
        axes.set_ylim(-0.7, len(names) + 0.2)
    right.set_xlabel("SQNR of the logits when it alone stays float, dB")
    figure.suptitle(
        f"{report['model']}, {entry['backend']}: the {len(shown)} most sensitive of {len(layers)} layers", fontsize=11, x=0.01, ha="left"
    )
    return figure


def ranges_plot(report: dict[str, Any]) -> "Figure":
    """Ranges of what layers read, in standard deviations, and how unequal channels are."""
    places = [place for place in report["activations"] if place["place"].endswith(".input")]
    figure, (upper, lower) = _axes(1, rows=2, height=6)
    at = range(len(places))
    low, high = ([(place[end] - place["mean"]) / max(place["std"], 1e-12) for place in places] for end in ("low", "high"))
    upper.vlines(at, low, high, color=BLUE, linewidth=2)
    upper.axhspan(-6, 6, color=GREY, alpha=0.2, linewidth=0)
    upper.set_ylabel("range, standard deviations\n(grey: up to 6)")
    lower.bar(at, [place["imbalance"] for place in places], color=ORANGE)
    lower.set_ylabel("largest channel,\nof the median one")
    lower.set_yscale("log")
    for axes, heights in ((upper, high), (lower, [place["imbalance"] for place in places])):
        highest = sorted(at, key=lambda index: -heights[index])[:5]
        for number, index in enumerate(highest, 1):  # names would cover each other: the highest are often neighbours
            axes.annotate(str(number), (index, heights[index]), fontsize=7, ha="center", va="bottom")
        named = "\n".join(f"{number} {places[index]['place'].removesuffix('.input')}" for number, index in enumerate(highest, 1))
        axes.text(1.01, 1, named, transform=axes.transAxes, fontsize=7, va="top")
    stages = [place["place"].split(".")[1] if place["place"].startswith("stages.") else place["place"].split(".")[0] for place in places]
    starts = [index for index in at if index and stages[index] != stages[index - 1]]
    for axes in (upper, lower):
        for start in starts:
            axes.axvline(start - 0.5, color=GREY, linewidth=0.8)
        axes.set_xlim(-1, len(places))
        axes.margins(y=0.25)
    upper.set_xticks([])
    lower.set_xticks(starts, [f"stage {stages[s]}" if stages[s].isdigit() else stages[s] for s in starts], ha="left", fontsize=8)
    figure.suptitle(f"{report['model']}: inputs of layers, in the order of the network", fontsize=11, x=0.01, ha="left")
    return figure


def pareto_plot(report: dict[str, Any], entry: dict[str, Any]) -> "Figure":
    """SQNR of the logits against latency while more and more layers stay float: the frontier, and layers from the image on."""
    pareto = entry["pareto"]
    figure, axes = _axes(1, height=4.5)
    for key, colour, style, label in (
        ("from_the_image", GREY, "--", "layers stay float from the image on"),
        ("frontier", BLUE, "-", "most noise for each multiplication first: int8_auto picks here"),
    ):
        points = [point for point in pareto[key] if point[2] is not None]
        axes.plot([point[1] for point in points], [point[2] for point in points], style, color=colour, label=label, linewidth=1.5)
    tried = [pareto["frontier"][count] for count in pareto["candidates"] if pareto["frontier"][count][2] is not None]
    axes.plot([point[1] for point in tried], [point[2] for point in tried], "o", color=BLUE, markersize=4, label="candidates, 2 dB apart")
    for point in tried[:6]:
        axes.annotate(f"{point[0]}", (point[1], point[2]), textcoords="offset points", xytext=(5, -9), fontsize=7, color=BLUE)
    plain = pareto["frontier"][0]
    axes.plot(plain[1], plain[2], "s", color=RED, label=f"plain {entry['precision'].upper()}: {entry['plain_ms']:.1f} ms, measured")
    axes.axvline(entry["float_ms"], color=RED, linewidth=1, linestyle=":", label=f"float: {entry['float_ms']:.1f} ms, measured")
    axes.set_xlabel("latency, ms (between the measured ends: by multiplications)")
    axes.set_ylabel("SQNR of the logits, dB\n(sum of the layers' noise)")
    axes.set_ylim(plain[2] - 2, plain[2] + SHOWN_DB)  # above, only what is float throughout
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    title = f"{report['model']}, {entry['backend']}: accuracy against latency; numbers are layers in float"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _axes(columns: int, rows: int = 1, height: float = 5) -> "tuple[Figure, Any]":
    """A figure of 10 inches, and its axes, without frames at the top and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes: Any = figure.subplots(rows, columns)
    for each in axes if rows * columns > 1 else (axes,):
        _plain(each)
    return figure, axes


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
