"""`gcvit-edge export`."""

import argparse
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import add_model_options, add_output_options, model_options

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """export a model in float32, without quantization, and pack a bundle

Each artifact must agree with PyTorch to rounding.

  gcvit-edge export --weights flowers.safetensors -o flowers-float
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_output_options(parser, "all", "MODEL.float")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.cli import Result
    from gcvit_edge.export import export_float
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.table import noise_warnings, timing_table

    bundle = export_float(
        **model_options(arguments), backends=arguments.backends, output=arguments.output, threads=arguments.threads,
        force=arguments.force, zip=arguments.zip, steps=Steps(errors),
    )  # fmt: skip
    table = timing_table(f"{bundle.info.name}, float", bundle.report["artifacts"])
    return Result(bundle.report | {"bundle": str(bundle.path)}, [table, *noise_warnings(bundle.report), f"bundle: {bundle.path}"])
