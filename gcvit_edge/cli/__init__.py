"""The command line: one module a verb; the file name is the verb.

A verb module (`build_runner.py` is `build-runner`) has `HELP`, `add_arguments(parser)` and `run(arguments, errors) -> Result`; it
imports what is heavy inside `run`. It gives None where another process of the same run shows the result. Here the verbs are put
together, errors become exit codes, and output is kept apart: standard output has the result alone.
"""

import argparse
import errno
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import RenderableType

import gcvit_edge.cli as _package
from gcvit_edge.cli._output import Terminal, captured_noise, is_unwritable, unwritable_ends
from gcvit_edge.errors import CheckFailed, LimitBroken, UserError, nearest
from gcvit_edge.interruption import interrupted
from gcvit_edge.registry import load_module, module_names

_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no hangup
_UNREACHABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}  # of a path that a user gave

# turns of libgomp's loop, some microseconds, instead of its 300,000: on CPUs that others use too, every operator of PyTorch else waits for
# a thread that is not running, and calibration took ten times as long; it takes 4 to 11 % longer on idle ones (benchmarks/NOTES.md)
_SPIN_COUNT = "1000"

EXIT_CODES = """\
exit codes:
  0  done, everything made and checked
  1  internal error
  2  bad input: the message says what was got, what was expected and what to do; nothing was written
  3  made and checked, but an accuracy limit of the recipe is broken
  4  a check failed: a changed bundle, a broken baseline, a device or backend that fails; or a disk is full
  5  an artifact gives other logits than its golden ones
  130  interrupted; nothing was written (train, int8_qat: the run so far, for --resume; of several devices: those that were done)
  141  who read the output has gone, as `| head` does
"""


@dataclass(frozen=True)
class Result:
    """What a verb gives back. data: for --json. shown: for people, in order. error: raised after both are printed."""

    data: Any
    shown: Sequence[RenderableType]
    error: LimitBroken | CheckFailed | KeyboardInterrupt | None = None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs, without importing anything heavy."""
    from gcvit_edge import __version__

    parser = argparse.ArgumentParser(
        prog="gcvit-edge",
        description="GC ViT in INT8 for ExecuTorch, OpenVINO and ONNX Runtime: quantized, measured on the artifact itself, bundled.",
        epilog="first steps:\n  gcvit-edge quantize --recipe int8_ptq      on the embedded sample, a few minutes\n"
        "  gcvit-edge predict BUNDLE photo.jpg\n  gcvit-edge VERB --help\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gcvit-edge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in module_names(_package):
        module = load_module(_package, "verb", name)
        verb = verbs.add_parser(
            name.replace("_", "-"), help=module.HELP.splitlines()[0], description=module.HELP, epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output, and nothing else there")
        verb.set_defaults(run=module.run, parser=verb)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; of an unknown option says its verb which one was meant perhaps, where argparse names no verb."""
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        verb: argparse.ArgumentParser = arguments.parser
        flag = unknown[0].partition("=")[0]
        guess = nearest(flag, re.findall(r"(?<!\S)--[a-z-]+", verb.format_help())) if flag.startswith("--") else None
        verb.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {guess}?" if guess else ""))
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Raises:
        OSError: who reads the output has gone, or a disk is full; the entry point makes exit codes of them.
    """
    arguments = _parsed(argv)
    with _caught_endings(), captured_noise() as streams:
        errors = Terminal(file=streams.err, stderr=True, emoji=False)
        try:
            result: Result | None = arguments.run(arguments, errors)
            if result is None:
                return 0
            if arguments.json:
                print(json.dumps(result.data, indent=2, allow_nan=False), file=streams.out, flush=True)
            else:
                console = Terminal(file=streams.out, emoji=False)
                for shown in result.shown:
                    text = isinstance(shown, str)  # may hold what looks like markup: labels, YAML lists
                    console.print(shown, soft_wrap=text, markup=not text, highlight=False)
            if result.error is None:
                return 0
            raise result.error
        except (UserError, LimitBroken, CheckFailed) as error:
            errors.print("[bold red]error:[/] ", end="")
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
            return error.exit_code
        except KeyboardInterrupt as interruption:
            return _interrupted(errors, interruption)
        except Exception as error:
            if interrupted.is_set():  # of which a library, or Python while it makes a class, has made another exception
                return _interrupted(errors, KeyboardInterrupt())
            if is_unwritable(error):
                raise  # to the entry point
            if isinstance(error, OSError) and error.errno in _UNREACHABLE:
                errors.print(f"error: {error.filename}: {error.strerror}; give another path", markup=False, highlight=False, soft_wrap=True)
                return UserError.exit_code
            errors.print_exception()
            errors.print(f"internal error; what the tools printed:\n{streams.noise_tail()}", markup=False, highlight=False)
            return 1


def _interrupted(errors: Terminal, interruption: KeyboardInterrupt) -> int:
    # Python notes an interruption that leaves an `exec` of a string (dataclasses are made by one) though it is caught further out, and
    # would kill itself by SIGINT after `python -m`; the next `exec` takes the note away
    exec("")
    errors.print(str(interruption) or "interrupted; nothing was written", markup=False, highlight=False, soft_wrap=True)
    return 130


@contextmanager
def _caught_endings() -> Iterator[None]:
    """Makes what ends a process an interruption, which cleans up; a hangup (a closed terminal, a lost SSH connection) unless ignored.

    Afterwards Ctrl-C is what it was; the others are not, since a second one may come while the process ends.
    """
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, *_ENDINGS):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        interrupted.clear()


def _interrupt(number: int, frame: FrameType | None) -> None:
    interrupted.set()
    for ending in _ENDINGS:  # a closing terminal says it twice: the second must not end the cleaning up
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def _spin_briefly() -> None:
    """Threads of PyTorch that wait for each other sleep soon, in this process and those that it starts, unless the user has said how
    they wait. libgomp reads it when it is loaded.

    Source: GNU libgomp manual, "GOMP_SPINCOUNT".
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def entry_point() -> None:
    """The console script."""
    _spin_briefly()
    with unwritable_ends():
        code = main()
        gc.freeze()  # else Python looks for cycles among all objects of the exporters before it ends: 2 s after `quantize`
        sys.exit(code)
