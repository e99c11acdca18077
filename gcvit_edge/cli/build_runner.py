"""`gcvit-edge build-runner`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """build the native C++ runner of .pte files, for this machine, for 64-bit ARM or for Android

It needs neither Python nor PyTorch on the device: copy the folder that this prints. Built once, then kept. For another
architecture pip downloads ExecuTorch's wheel of it, once. For Android on 64-bit ARM set ANDROID_NDK, the folder of the NDK, and
EXECUTORCH_ANDROID, the folder into which an ExecuTorch that you built for Android was installed.

  gcvit-edge build-runner
  gcvit-edge build-runner --arch aarch64
  gcvit-edge build-runner --arch android
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", metavar="A", help="x86_64 or aarch64, as `uname -m` has it, or android (default: this machine's)")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.cli import Result
    from gcvit_edge.native.android import build_android_runner
    from gcvit_edge.native.build import build_runner, host
    from gcvit_edge.progress import Steps

    architecture = arguments.arch or host()
    with Steps(errors).step(f"runner for {architecture}"):
        files = build_android_runner() if architecture == "android" else build_runner(architecture)
    size = sum(file.stat().st_size for file in (files.executable, *files.libraries))
    data = {
        "architecture": architecture,
        "executable": str(files.executable),
        "libraries": [str(library) for library in files.libraries],
        "bytes": size,
    }
    usage = f"on the device: ./{files.executable.name} FILE.pte THREADS"
    return Result(data, [f"{files.executable.parent}: {len(files.libraries) + 1} files, {size / 1e6:.1f} MB", usage])
