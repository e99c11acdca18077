"""`gcvit-edge verify`."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """recompute every hash of a bundle and replay its golden tensors in each runtime

  gcvit-edge verify BUNDLE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result

    bundle = open_bundle(arguments.bundle)
    replays = bundle.verify()
    lines = [f"{len(bundle.manifest.files)} files have the hashes that bundle.json lists"]
    lines += [
        f"{replay.artifact}: golden output reproduced "
        + ("exactly" if replay.sqnr_db == float("inf") else f"to {replay.sqnr_db:.1f} dB (at least {replay.minimum_db:.0f})")
        for replay in replays
    ]
    data = {"files": len(bundle.manifest.files), "replays": [asdict(r) | {"sqnr_db": min(r.sqnr_db, 999.0)} for r in replays]}
    return Result(data, lines)
