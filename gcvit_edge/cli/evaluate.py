"""`gcvit-edge evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import skipped_lines

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """accuracy of a bundle's artifacts on a folder of images

With float artifacts in the bundle (quantize --keep-float), the drop against them too.

  gcvit-edge evaluate BUNDLE --data val/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder or .zip of images, one sub-folder a class")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from rich.table import Table

    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.measure import evaluate_bundle
    from gcvit_edge.progress import Steps

    data = evaluate_bundle(open_bundle(arguments.bundle), arguments.data, Steps(errors))
    table = Table(title=f"{data['images']} images", title_justify="left")
    for heading in ("runtime", "precision"):
        table.add_column(heading)
    for heading in ("top-1 (95 % interval)", "top-5", "drop, points (95 % interval)", "agreement", "SQNR"):
        table.add_column(heading, justify="right")
    for entry in data["artifacts"]:
        low, high = entry["top1_ci95"]
        row = [entry["backend"], entry["precision"], f"{entry['top1']:.2%} ({low:.2%} to {high:.2%})", f"{entry['top5']:.2%}"]
        if "drop_points" in entry:
            low, high = entry["drop_ci95"]
            row += [f"{entry['drop_points']:+.2f} ({low:+.2f} to {high:+.2f})", f"{entry['agreement']:.2%}", f"{entry['sqnr_db']:.1f} dB"]
        table.add_row(*row)
    return Result(data, [table, *skipped_lines(data["skipped_images"])])
