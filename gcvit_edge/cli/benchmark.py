"""`gcvit-edge benchmark`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import add_threads

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """latency, load time and memory of a bundle's artifacts on this machine

Each artifact runs in a fresh process; rounds are interleaved.

  gcvit-edge benchmark BUNDLE --threads 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="interleaved rounds of 5 runs each (%(default)s)")
    add_threads(parser)


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.measure import benchmark_bundle
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.table import timing_table

    data = benchmark_bundle(open_bundle(arguments.bundle), arguments.threads, arguments.rounds, Steps(errors))
    return Result(data, [timing_table(f"{data['machine']['cpu']}, {data['machine']['threads']} threads, batch 1", data["artifacts"])])
