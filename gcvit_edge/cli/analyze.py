"""`gcvit-edge analyze`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cli._options import add_backend, add_model_options, add_threads, add_training_options, model_options

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.bundle import Bundle
    from gcvit_edge.cli import Result

HELP = """where quantization hurts: sensitivity of every layer, each runtime against its simulation, outliers, drift by class

Without a bundle it makes the artifacts of --recipe and looks at them; with one, at those of the bundle, whose weights and images
must be given again. Layers are measured on 16 images; an interrupted analysis goes on where it was.

  gcvit-edge analyze -o analysis                                                        the embedded sample
  gcvit-edge analyze --weights FILE --calib train/ --eval val/ --backend onnx -o analysis
  gcvit-edge analyze BUNDLE --weights FILE --calib train/ --eval val/

What int8_qat has learned is in its artifacts alone, so it is fine-tuned again on the same --train, which takes as long as before. "Float"
is then the fine-tuned network before it is rounded, and for the drift of classes the float artifact, which was not fine-tuned.

  gcvit-edge analyze BUNDLE --weights FILE --calib train/ --train train/ --eval val/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="bundle folder or .zip (default: artifacts are made)")
    parser.add_argument("--recipe", metavar="NAME", help="name, of `recipes list`, or .yaml file (default: int8_ptq; a bundle has its own)")
    add_model_options(parser)
    images = parser.add_argument_group("images: a folder or .zip with one sub-folder a class")
    images.add_argument("--calib", type=Path, metavar="DIR", help="calibrates, and what does not calibrate measures sensitivity")
    images.add_argument("--eval", type=Path, metavar="DIR", help="measures the drift of classes; other images than --calib")
    add_training_options(parser)
    add_backend(parser, "only this backend; may be given again (default: those of the bundle or recipe)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="also write analysis.json and plots (PNG, SVG) here")
    add_threads(parser)


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    import tempfile

    from gcvit_edge.analysis import analyze, plan_analysis
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.analysis import analysis_tables, check_folder, write_analysis

    if arguments.output:
        check_folder(arguments.output)
    bundle: Bundle | None = open_bundle(arguments.bundle) if arguments.bundle else None
    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as scratch:
        job = plan_analysis(
            bundle, arguments.recipe, Path(scratch), **model_options(arguments), calib=arguments.calib, eval=arguments.eval,
            train=arguments.train, backends=arguments.backend, threads=arguments.threads, device=arguments.device,
        )  # fmt: skip
        report = analyze(job, bundle, Steps(errors), arguments.backend)
    shown = analysis_tables(report)
    if arguments.output:
        written = write_analysis(report, arguments.output)
        shown.append(f"written to {arguments.output}: {', '.join(written)}")
    return Result(report, shown)
