"""`gcvit-edge profile`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcvit_edge.cli._options import add_threads

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """where the time of an artifact goes, operator by operator, and why it is as fast as it is

From the runtime's own profiler: ONNX Runtime's, OpenVINO's counters, ExecuTorch's ETDump with XNNPACK's operators. Bundles with
float artifacts (quantize --with-float) show both, and what quantization saves and costs.

  gcvit-edge profile BUNDLE --backend openvino
  gcvit-edge profile BUNDLE --backend executorch --etdump FILE    a profile that `benchmark --etdump` wrote on a device
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .zip")
    parser.add_argument("--backend", required=True, metavar="B", help="whose artifact: executorch, openvino or onnx")
    parser.add_argument("--etdump", type=Path, metavar="FILE", help="read this ETDump of an artifact instead of running it here")
    add_threads(parser)


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.bundle import open_bundle
    from gcvit_edge.cli import Result
    from gcvit_edge.measurement.profile import profile_bundle
    from gcvit_edge.progress import Steps
    from gcvit_edge.report.profile import profile_table

    report: dict[str, Any] = profile_bundle(
        open_bundle(arguments.bundle), arguments.backend, arguments.threads, arguments.etdump, Steps(errors)
    )
    return Result(report, [profile_table(report), *report["verdict"]])
