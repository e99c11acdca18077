"""`gcvit-edge benchmark`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcvit_edge.cli._options import add_devices, devices, measured

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """latency, load time, memory and parity of a bundle's artifacts, here or on devices

Each artifact runs in a fresh process and must reproduce its golden logits. Mode quick: 150 inferences, artifacts take turns.
Mode single-stream: as in MLPerf, at least 1,024 inferences of each artifact, scored by the 90th percentile; 60 s, MLPerf: 600.

  gcvit-edge benchmark BUNDLE --threads 2
  gcvit-edge benchmark BUNDLE --mode single-stream --json > result.json
"""


class _PrintSchema(argparse.Action):
    """Prints the JSON schema of the result and ends, like --version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import json

        from gcvit_edge.measurement.result import Report

        print(json.dumps(Report.model_json_schema(), indent=2), file=sys.stdout)
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("--mode", choices=("quick", "single-stream"), default="quick", help="how much to time (%(default)s)")
    parser.add_argument("--schema", action=_PrintSchema, nargs=0, help="print the JSON schema of the result and exit")
    add_devices(parser)


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.measurement.measure import benchmark_bundle
    from gcvit_edge.measurement.timing import MODES
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.devices import benchmark_table, count_lines, machine_lines, warnings

    bundle, mode = open_bundle(arguments.bundle), MODES[arguments.mode]
    report, error = measured(lambda: benchmark_bundle(bundle, devices(arguments), mode, Steps(errors), arguments.backend))
    shown = [benchmark_table(report), *machine_lines(report), *count_lines(report), *warnings(report)]
    return Result(report.model_dump(mode="json"), shown, error)
