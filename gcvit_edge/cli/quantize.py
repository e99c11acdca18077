"""`gcvit-edge quantize`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import (
    add_model_options,
    add_output_options,
    add_training_options,
    model_options,
    resumable,
    skipped_lines,
)
from gcvit_edge.errors import LimitBroken

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result
    from gcvit_edge.recipe import Recipe

HELP = """quantize a model for every backend, measure each artifact against float, and pack a bundle

Without --weights it runs on the embedded sample: GC ViT-XXT on Fashion-MNIST.

  gcvit-edge quantize --recipe int8_ptq
  gcvit-edge quantize --recipe int8_ptq --weights flowers.safetensors --calib train/ --eval val/ -o flowers-int8
  gcvit-edge quantize --recipe int8_auto --max-drop 0.3 ...    layers stay float where the limit needs it

With --recipe int8_qat it fine-tunes in INT8 before; an interrupted run goes on, on a CPU bit for bit, with the same command and --resume.

  gcvit-edge quantize --recipe int8_qat --weights flowers.safetensors --calib train/ --train train/ --eval val/ -o flowers-int8
  accelerate launch --multi_gpu --num_processes 8 -m gcvit_edge quantize --recipe int8_qat ...   several GPUs or machines
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="int8_ptq", metavar="NAME", help="name, of `recipes list`, or .yaml file (%(default)s)")
    add_model_options(parser)
    images = parser.add_argument_group("images: a folder or .zip with one sub-folder a class")
    images.add_argument("--calib", type=Path, metavar="DIR", help="sets the INT8 ranges; some hundred images like those in use")
    images.add_argument("--eval", type=Path, metavar="DIR", help="measures the accuracy; other images than --calib")
    images.add_argument("--eval-images", type=int, metavar="N", help="of --eval, spread evenly over the classes (default: all)")
    add_training_options(parser).add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--max-drop", type=float, metavar="D", help="limit of the top-1 drop in points (default: the recipe's)")
    add_output_options(parser, "those of the recipe", "MODEL.RECIPE")
    parser.add_argument("--with-float", action="store_true", help="put the float artifacts into the bundle too")
    parser.add_argument("--dry-run", action="store_true", help="check everything but whether images decode, print the plan, write nothing")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result | None":
    from gcvit_edge.cli import Result
    from gcvit_edge.pipeline import run_job
    from gcvit_edge.plan import describe_plan, plan
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.search import search_lines
    from gcvit_edge.report.table import epochs_table, limit_warnings, noise_warnings, results_table, seconds_table

    job = plan(
        arguments.recipe, **model_options(arguments), calib=arguments.calib, eval=arguments.eval, train=arguments.train,
        eval_images=arguments.eval_images, backends=arguments.backends, output=arguments.output, threads=arguments.threads,
        device=arguments.device, resume=arguments.resume, force=arguments.force, with_float=arguments.with_float, zip=arguments.zip,
        max_drop=arguments.max_drop,
    )  # fmt: skip
    main = job.tuning is None or job.tuning.accelerator.is_main_process
    elsewhere = for_another_cpu(job.recipe, job.backends)
    if arguments.dry_run and not main:
        return None
    if arguments.dry_run:
        described = describe_plan(job)
        lines = [f"{key}: {_readable(value)}" for key, value in described.items()]
        return Result(described, [*lines, *elsewhere, "dry run: nothing was written"])
    for line in elsewhere if main else []:  # before what takes minutes
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
    with resumable(job.tuning.state if job.tuning else None):
        bundle = run_job(job, Steps(errors if main else None))
    if bundle is None:
        return None
    report = bundle.report
    broken = [entry["backend"] for entry in report["artifacts"] if not entry["within_limits"]]
    error = None
    if broken:
        limits = job.recipe.limits
        error = LimitBroken(
            f"{', '.join(broken)}: top-1 drop over {limits.max_drop} points or agreement below {limits.min_agreement:.1%}, the limits of "
            f"{job.recipe.name}; the bundle {job.output} is there to look at, but should not ship"
        )
    training = [epochs_table(report["training"]["epochs"])] if "training" in report else []
    skipped = skipped_lines(report["skipped_images"])
    notes = [*limit_warnings(report), *noise_warnings(report), *elsewhere, *search_lines(report)]
    shown = [*training, results_table(report), *notes, seconds_table(report["seconds"]), *skipped, f"bundle: {job.output}"]
    return Result(report | {"bundle": str(job.output)}, shown, error)


def for_another_cpu(recipe: "Recipe", backends: Sequence[str]) -> list[str]:
    """A line where OpenVINO's INT8 is made for CPUs with VNNI, and timed on one without."""
    from gcvit_edge.measurement.machine import without_int8_products

    said = without_int8_products(backends) if "openvino" in backends and recipe.precision == "int8" and recipe.x86 == "vnni" else None
    return [said] if said else []


def _readable(value: object) -> str:
    """Without the brackets of Python: `resize 256, mode shortest_edge, mean 0.485 0.456 0.406`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(each)}" for key, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
