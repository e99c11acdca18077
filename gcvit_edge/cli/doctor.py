"""`gcvit-edge doctor`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """what is installed, what works on this machine, and the CPU features that fast INT8 needs

Of a small model, quantized once, every runtime's artifact is made and run: half a minute to a minute; --quick only looks.

  gcvit-edge doctor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="only look at versions and CPU features; run nothing")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from rich.markup import escape
    from rich.table import Table

    from gcvit_edge.cli import Result
    from gcvit_edge.doctor import examine
    from gcvit_edge.errors import CheckFailed
    from gcvit_edge.progress import Steps

    data = examine(Steps(errors), quick=arguments.quick)
    packages = Table("package", "version", title="Installed", title_justify="left")
    for name, version in data["packages"].items():
        packages.add_row(name, version or "[red]not installed[/]")
    backends = Table("backend", "state", title="Backends", title_justify="left")
    for name, state in data["backends"].items():
        backends.add_row(name, f"[green]{escape(state)}[/]" if state.startswith("works") else escape(state))
    targets = Table("target", "state", title="Targets", title_justify="left")
    for name, state in data["targets"].items():
        targets.add_row(name, f"[green]{state}[/]" if state == "available" else escape(state))
    features = Table("feature", "for", "here", title=f"{data['cpu']}, {data['cpus']} CPUs", title_justify="left")
    for feature in data["int8_features"]:
        features.add_row(feature["flag"], feature["meaning"], "[green]yes[/]" if feature["present"] else "[yellow]no[/]")
    failed = [f"{name} {state}" for name, state in data["backends"].items() if state.startswith("fails")]
    error = CheckFailed("\n".join(failed)) if failed else None
    return Result(data, [packages, backends, targets, features, data["verdict"]], error)
