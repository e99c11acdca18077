"""Options that several verbs share."""

import argparse
from pathlib import Path
from typing import Any


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which network: --model, --weights, --num-classes, --labels, --preprocessing."""
    group = parser.add_argument_group("model (default: the embedded sample, gcvit_xxtiny on Fashion-MNIST)")
    group.add_argument("--model", metavar="NAME", help="variant, such as gcvit_xxtiny (default: recognised from the weights)")
    group.add_argument("--weights", metavar="FILE", help="checkpoint of timm, NVlabs or gcvit-edge (.safetensors, .pth), or hf-hub:ID")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes that the checkpoint must have (default: what it has)")
    group.add_argument("--labels", type=Path, metavar="FILE", help="class names in the order of the logits: a name a line, or JSON")
    group.add_argument(
        "--preprocessing", type=Path, metavar="FILE",
        help="preprocessor_config.json (default: the checkpoint's; else timm's crop 0.875, or NVlabs' own for its files)",
    )  # fmt: skip


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_model_options`, files read."""
    from gcvit_edge.data import read_labels, read_preprocessing

    return {
        "model": arguments.model,
        "weights": arguments.weights,
        "num_classes": arguments.num_classes,
        "labels": read_labels(arguments.labels) if arguments.labels else None,
        "preprocessing": read_preprocessing(arguments.preprocessing) if arguments.preprocessing else None,
    }


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where the bundle goes: --backends, --output, --zip, --force, --threads."""
    parser.add_argument("--backends", nargs="+", metavar="B", help="executorch openvino onnx (default: all, or those of the recipe)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="the bundle to make (default: MODEL.RECIPE here)")
    parser.add_argument("--zip", action="store_true", help="one .zip file instead of a folder")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is already there")
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a timed artifact (default: all CPUs)")


def skipped_lines(names: list[str]) -> list[str]:
    """What to say of images that did not decode; nothing if there were none."""
    if not names:
        return []
    return [f"skipped {len(names)} images that do not decode: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"]
