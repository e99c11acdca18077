"""`gcvit-edge evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import add_devices, devices, measured, skipped_lines

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """accuracy of a bundle's artifacts on a folder of images, here or on devices

With float artifacts in the bundle (quantize --with-float), the drop against them too.

  gcvit-edge evaluate BUNDLE --data val/
  gcvit-edge evaluate BUNDLE --data val/ --eval-images 500 --target ssh:pi@board
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder or .zip of images, one sub-folder a class")
    parser.add_argument("--eval-images", type=int, metavar="N", help="so many of them, spread evenly over the classes (default: all)")
    add_devices(parser, evaluates=True)


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.measurement.measure import evaluate_bundle
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.devices import accuracy_table, machine_lines

    bundle = open_bundle(arguments.bundle)
    report, error = measured(
        lambda: evaluate_bundle(bundle, devices(arguments), arguments.data, Steps(errors), arguments.backend, arguments.eval_images)
    )
    shown = [accuracy_table(report), *machine_lines(report), *skipped_lines(report.skipped_images)]
    return Result(report.model_dump(mode="json"), shown, error)
