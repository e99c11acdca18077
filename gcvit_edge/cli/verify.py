"""`gcvit-edge verify`."""

import argparse
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
    from gcvit_edge.bundle.bundle import wrong_answers
    from gcvit_edge.bundle.manifest import GOLDEN_IMAGE, GOLDEN_PREPROCESSED
    from gcvit_edge.cli import Result

    bundle = open_bundle(arguments.bundle)
    bundle.verify_content()
    replays = bundle.replay()
    lines = [f"{len(bundle.manifest.files)} files have the hashes that bundle.json lists"]
    if bundle.has_golden_image:
        lines.append(f"{GOLDEN_IMAGE} is preprocessed to {GOLDEN_PREPROCESSED} here too")
    for name, parity in replays.items():
        lines.append(f"{name}: golden output {'' if parity.passed else 'not '}reproduced, {parity.describe()}")
    replayed = [{"artifact": name, **parity.model_dump()} for name, parity in replays.items()]
    return Result({"files": len(bundle.manifest.files), "replays": replayed}, lines, wrong_answers(replays))
