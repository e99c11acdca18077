"""`gcvit-edge predict`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """classify images with a bundle

  gcvit-edge predict BUNDLE photo.jpg other.png --backend openvino --top 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--backend", metavar="B", help="which artifact (default: the bundle's first)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many classes (%(default)s)")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result

    predictions = open_bundle(arguments.bundle).predict(arguments.images, arguments.backend, arguments.top)
    data, lines = [], []
    for image, classes in zip(arguments.images, predictions, strict=True):
        data.append({"image": str(image), "classes": [{"label": name, "probability": round(p, 6)} for name, p in classes]})
        lines.append(str(image))
        lines += [f"  {probability:7.2%}  {name}" for name, probability in classes]
    return Result(data, lines)
