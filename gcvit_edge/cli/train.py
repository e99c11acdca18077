"""`gcvit-edge train`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import resumable, skipped_lines

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """train a model in float on a folder of images, from random weights or from a checkpoint

An interrupted run goes on, on a CPU bit for bit, with the same command and --resume. The result is the average of the weights (EMA).

  gcvit-edge train --data train/ --eval val/ --weights pretrained.safetensors --epochs 10 -o mine.safetensors
  gcvit-edge train --data train/ --model gcvit_tiny --epochs 300 --settings heavy.yaml --device cuda -o mine.safetensors
  accelerate launch --multi_gpu --num_processes 8 -m gcvit_edge train --data train/ ...          several GPUs or machines
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images: a folder or .zip with one sub-folder a class")
    images.add_argument("--data", type=Path, required=True, metavar="DIR", help="to train on")
    images.add_argument("--eval", type=Path, metavar="DIR", help="other images: the accuracy after each epoch")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="variant (default: recognised from the weights, else gcvit_xxtiny)")
    model.add_argument("--weights", metavar="FILE", help="checkpoint to start from, or hf-hub:ID (default: random weights)")
    model.add_argument("--labels", type=Path, metavar="FILE", help="class names in the order of the logits (default: the folders)")
    model.add_argument(
        "--preprocessing", type=Path, metavar="FILE", help="preprocessor_config.json (default: the checkpoint's, else timm's)"
    )
    model.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the checkpoint's, else the variant's)")
    model.add_argument("--drop-path", type=float, default=0.0, metavar="P", help="stochastic depth (%(default)s)")
    model.add_argument("--freeze-stages", type=int, default=0, metavar="N", help="keep stem and first N stages as they are (%(default)s)")
    run = parser.add_argument_group("training (what is not given: --settings, else the defaults)")
    run.add_argument("--settings", type=Path, metavar="FILE", help="YAML with any of the training settings, augmentation too")
    run.add_argument("--epochs", type=int, metavar="N", help="passes over the images (10)")
    run.add_argument("--batch-size", type=int, metavar="N", help="images of an optimizer step, over all processes (32)")
    run.add_argument("--micro-batch", type=int, metavar="N", help="images of a forward pass (default: the batch of a process)")
    run.add_argument("--lr", type=float, metavar="X", help="peak learning rate (2e-4)")
    run.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "auto"),
        help="of the forward pass's products (float32); auto: bfloat16 where the device has it",
    )
    run.add_argument("--seed", type=int, metavar="N", help="of order, augmentation and a new head (0)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    run.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--licence", "--license", metavar="SPDX", help="licence of the result (default: that of --weights)")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result | None":
    from gcvit_edge.cli import Result
    from gcvit_edge.data import read_labels, read_preprocessing
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.table import epochs_table
    from gcvit_edge.training.job import plan_training, run_training
    from gcvit_edge.training.settings import read_settings

    flags = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "micro_batch": arguments.micro_batch,
        "learning_rate": arguments.lr,
        "precision": arguments.precision,
        "seed": arguments.seed,
    }
    job = plan_training(
        arguments.data,
        arguments.output,
        eval=arguments.eval,
        model=arguments.model,
        weights=arguments.weights,
        labels=read_labels(arguments.labels) if arguments.labels else None,
        preprocessing=read_preprocessing(arguments.preprocessing) if arguments.preprocessing else None,
        image_size=arguments.image_size,
        drop_path=arguments.drop_path,
        freeze_stages=arguments.freeze_stages,
        settings=read_settings(arguments.settings, {key: value for key, value in flags.items() if value is not None}),
        device=arguments.device,
        licence=arguments.licence,
        resume=arguments.resume,
        force=arguments.force,
    )
    main = job.accelerator.is_main_process
    if job.new_head and main:
        classes = ", ".join(job.info.labels.names[:5]) + (", ..." if len(job.info.labels.names) > 5 else "")
        errors.print(f"a new head: {arguments.weights} is for other classes than {classes}", markup=False, highlight=False)
    with resumable(job.state):
        report = run_training(job, Steps(errors if main else None))
    if not main:
        return None
    return Result(report, [epochs_table(report["epochs"]), *skipped_lines(report["skipped_images"]), f"checkpoint: {job.output}"])
