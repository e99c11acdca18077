"""Tables of a report on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def compact_table(title: str, caption: str | None = None) -> Table:
    """An empty table whose columns are as near to each other as can be, for 80 columns."""
    return Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True
    )


def compared_cells(entry: Mapping[str, Any]) -> list[str]:
    """Drop in points, agreement and SQNR in dB, each with its 95 % interval below it. entry: with these by the names of reports."""
    drop, same, noise = entry["drop_ci95"], entry["agreement_ci95"], entry["sqnr_ci95"]
    return [
        f"{entry['drop_points']:+.2f}\n[dim]{drop[0]:+.2f} {drop[1]:+.2f}[/]",
        f"{entry['agreement']:.2%}\n[dim]{100 * same[0]:.1f} {100 * same[1]:.1f}[/]",
        f"{entry['sqnr_db']:.1f}\n[dim]±{(noise[1] - noise[0]) / 2:.1f}[/]",
    ]


def results_table(report: dict[str, Any]) -> Table:
    """One line an INT8 artifact, with float beside it; fits 80 columns."""
    machine = report["machine"]
    table = compact_table(
        f"{report['model']}, {report['recipe']}: {report['images']} images, float top-1 {report['float']['top1']:.2%}",
        "drop in points, SQNR in dB; below them, 95 % intervals; ms: median, batch 1, "
        f"{machine['threads']} threads, {escape(machine['cpu'])}",
    )
    table.add_column("runtime", no_wrap=True)
    for heading in ("top-1", "drop", "agree", "SQNR", "MB", "ms", "faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in report["artifacts"]:
        table.add_row(
            entry["backend"] if entry["within_limits"] else f"[red]{entry['backend']}\nover limit[/]",
            f"{entry['top1']:.2%}",
            *compared_cells(entry),
            f"{entry['size_bytes'] / 1e6:.1f}\n[dim]of {entry['float_size_bytes'] / 1e6:.1f}[/]",
            f"{entry['latency_ms']['p50']:.1f}\n[dim]of {entry['float_latency_ms']['p50']:.1f}[/]",
            f"{entry['speedup']:.2f}x",
        )
    return table


def noisy(spread: float) -> str:
    """What to say of a timing whose spread is past the limit."""
    longer = f"noisy, one inference in ten takes {spread:.0%} longer than the median"
    return f"{longer}; end other programs, or let the device cool, and measure again"


def noise_warnings(report: dict[str, Any]) -> list[str]:
    """What makes the times of a report doubtful, a line each."""
    lines = []
    for entry in report["artifacts"]:
        for precision, prefix in ((entry["precision"], ""), ("float", "float_")):
            if entry.get(f"{prefix}noisy"):
                lines.append(f"warning: {entry['backend']}.{precision}: {noisy(entry[f'{prefix}spread'])}")
    return lines


def limit_warnings(report: dict[str, Any]) -> list[str]:
    """A line where a drop is within the limit, but the images do not show it; a limit of 0 none do."""
    limit = report["limits"]["max_drop"]
    open_still = [entry for entry in report["artifacts"] if entry["drop_points"] <= limit < entry["drop_ci95"][1] and limit > 0]
    wide = [f"{entry['drop_ci95'][1]:+.2f} ({entry['backend']})" for entry in open_still]
    if not wide:
        return []
    return [
        f"warning: {report['images']} images leave open whether the drop is within {limit} points: its interval ends at {', '.join(wide)}; "
        "the more images --eval has, the narrower it is"
    ]


def timing_table(title: str, entries: list[dict[str, Any]]) -> Table:
    """Latency, load time (both in ms) and memory of artifacts; fits 80 columns."""
    table = compact_table(title)
    table.add_column("artifact", no_wrap=True)
    for heading in ("p50 ms", "p90", "p99", "first", "load", "MB", "RAM"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        latency = entry["latency_ms"]
        table.add_row(
            f"{entry['backend']} {entry['precision']}", *(f"{latency[key]:.2f}" for key in ("p50", "p90", "p99")),
            f"{entry['first_ms']:.1f}", f"{entry['load_ms']:.0f}", f"{entry['size_bytes'] / 1e6:.1f}", f"{entry['peak_rss_mb']:.0f}",
        )  # fmt: skip
    return table


def epochs_table(epochs: list[dict[str, Any]]) -> Table:
    """How a training run went."""
    table = Table(title="Training", title_justify="left", box=box.SIMPLE)
    for heading in ("epoch", "loss", "accuracy", "evaluation", "seconds"):
        table.add_column(heading, justify="right")
    for number, epoch in enumerate(epochs, 1):
        evaluation = "" if epoch["evaluation"] is None else f"{epoch['evaluation']:.2%}"
        table.add_row(str(number), f"{epoch['loss']:.4g}", f"{epoch['accuracy']:.1%}", evaluation, f"{epoch['seconds']:.1f}")
    return table


def seconds_table(seconds: dict[str, float]) -> Table:
    """Where the time went."""
    table = Table(title="Where the time went", title_justify="left", box=box.SIMPLE)
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("[bold]all[/]", f"[bold]{sum(seconds.values()):.1f}[/]")
    return table
