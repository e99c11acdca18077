"""`gcvit-edge convert`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import add_model_options, model_options
from gcvit_edge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """write a checkpoint of timm or NVlabs as safetensors in our layout, with labels, preprocessing, origin and licence inside

The keys are timm's, so the file also loads into timm's model of the same name.

  gcvit-edge convert --weights gcvit_1k_xxtiny.pth.tar -o gcvit_xxtiny.safetensors
  gcvit-edge convert --weights mine.pth --labels labels.txt --licence Apache-2.0 --origin "trained on our photographs" -o mine.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, sample=False)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--licence", "--license", metavar="SPDX", help="licence of the weights (default: what the origin implies)")
    parser.add_argument("--origin", metavar="TEXT", help="where the weights come from (default: the name of the file)")
    parser.add_argument("--half", action="store_true", help="store float16 (half the size)")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.cli import Result
    from gcvit_edge.model.checkpoint import save_checkpoint
    from gcvit_edge.model.create import load_model
    from gcvit_edge.paths import is_full

    options = model_options(arguments)
    output = arguments.output
    if output.suffix != ".safetensors":
        raise UserError(f"--output must end in .safetensors, got {output.name}")
    if output.exists() and not arguments.force:
        raise UserError(f"{output} exists; give --force to replace it, or another --output")
    model, info = load_model(
        options["weights"], options["model"], num_classes=options["num_classes"], labels=options["labels"],
        preprocessing=options["preprocessing"],
    )  # fmt: skip
    changes = {key: value for key, value in (("licence", arguments.licence), ("source", arguments.origin)) if value}
    info = info.model_copy(update={"origin": info.origin.model_copy(update=changes)})
    try:
        save_checkpoint(model, info, output, half=arguments.half)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"cannot write {output}: {error}; choose another --output") from error
    lines = [f"{output}: {info.name}, {len(info.labels.names)} classes, licence {info.origin.licence}, origin {info.origin.source}"]
    return Result({"file": str(output), **info.model_dump()}, lines)
