"""The table of a profile."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from gcvit_edge.measurement.operators import KINDS

SHOWN = 16


def profile_table(report: dict[str, Any]) -> Table:
    """Time by kind, then by operator, with float beside INT8 where the bundle has it; fits 100 columns."""
    profiles = report["profiles"]
    what = ", ".join([escape(report["model"]), report["backend"], *([f"{report['threads']} threads"] if report["threads"] else [])])
    table = Table(title=f"{what}:\nms of one inference (number of operators)", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for precision in profiles:
        table.add_column(escape(precision), justify="right")
    table.add_row("all", *(f"{each['total_ms']:.2f}" for each in profiles.values()), style="bold", end_section=True)
    for kind, meaning in KINDS.items():
        if not any(each["kinds"][kind]["count"] for each in profiles.values()):
            continue
        table.add_row(meaning, *(f"{each['kinds'][kind]['ms']:.2f} ({each['kinds'][kind]['count']})" for each in profiles.values()))
    table.add_section()
    times = {name: {each["operator"]: each for each in summary["operators"]} for name, summary in profiles.items()}
    operators = {name: None for summary in profiles.values() for name in (each["operator"] for each in summary["operators"])}
    longest = sorted(operators, key=lambda name: -max(each[name]["ms"] for each in times.values() if name in each))[:SHOWN]
    for name in longest:
        table.add_row(escape(name), *(f"{each[name]['ms']:.2f} ({each[name]['count']})" if name in each else "" for each in times.values()))
    return table
