"""This machine: every artifact runs in a fresh process of its own, so that no runtime disturbs another."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from gcvit_edge.cpus import default_threads, fastest_here
from gcvit_edge.measurement.timing import QUICK, Timing, time_sessions
from gcvit_edge.targets import Case, Connection, Hold, side_by_side
from gcvit_edge.targets._process import LocalFolder, ProcessSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gcvit_edge.artifact import Artifact
    from gcvit_edge.data import Pixels, Preprocessing
    from gcvit_edge.measurement.machine import Machine

HELP = "this machine's CPU, each artifact in a fresh Python process; runs every backend"
ADDRESS = "none"
MEASURES_TIME = True

TIMED_ROUNDS = 20  # where artifacts are timed beside what else is done with them
MIN_SHARE = 128  # images of a process: loading an artifact takes as long as some 50


@dataclass(frozen=True)
class Options:
    """This target has none of its own."""


def missing(address: str) -> str | None:
    return None


def cases(artifacts: "Sequence[Artifact]", options: Options) -> list[Case]:
    return [Case(artifact, "cpu") for artifact in artifacts]


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    yield Local()


class Local(Connection):
    """This machine."""

    def __init__(self) -> None:
        self.side_by_side = default_threads()

    def machine(self) -> "Machine":
        from gcvit_edge.measurement.machine import this_machine

        return this_machine()

    def open(self, case: Case, threads: int, *, pinned: bool) -> "Session":
        return Session(case.artifact, threads, pinned=pinned)


class Session(ProcessSession):
    """One artifact in a fresh Python process."""

    def __init__(self, artifact: "Artifact", threads: int, *, pinned: bool = False) -> None:
        """Starts the process and loads the artifact. pinned: on as many CPUs as threads, the fastest.

        Raises:
            CheckFailed: the runtime cannot load it; the message ends with what the runtime printed.
        """
        # -P: nothing is imported from the current folder, which may be a downloaded bundle, or hold an onnx.py of the user's own
        command = [sys.executable, "-P", "-m", "gcvit_edge.targets._worker", artifact.backend, str(artifact.path.resolve()), str(threads)]
        cpus = fastest_here() if pinned else []
        if threads < len(cpus):
            command.append(",".join(map(str, cpus[:threads])))
        super().__init__(artifact, command, LocalFolder())


def run_artifacts(
    artifacts: "Sequence[Artifact]",
    pixels: "Pixels",
    preprocessing: "Preprocessing",
    advance: Callable[[], object],
    count: int | None = None,
) -> "list[NDArray[np.float32]]":
    """Logits (N, classes) of every artifact on the first `count` images (None: all).

    The images are divided among all CPUs, one thread each, which is the most images a second: a layer's work divided among threads has to
    wait for the slowest of them at its end.
    """
    import numpy as np

    threads, images = default_threads(), len(pixels.kept[:count])
    share = max(MIN_SHARE, -(-images // threads))
    starts = range(0, images, share)

    def run(job: "tuple[Artifact, int]", hold: Hold) -> "NDArray[np.float32]":
        artifact, start = job
        with hold(Session(artifact, threads=1)) as session:
            return session.run(pixels, preprocessing, start, min(start + share, images), advance)

    parts = side_by_side(run, list(product(artifacts, starts)), threads)
    return [np.concatenate(parts[first : first + len(starts)]) for first in range(0, len(parts), len(starts))]


def time_artifacts(
    artifacts: "Sequence[Artifact]", shape: Sequence[int], threads: int, rounds: int, advance: Callable[[], object]
) -> list[Timing]:
    """Times every artifact on noise of `shape` (1, C, H, W): all loaded, then in turn, `rounds` times a few inferences each.

    Calls `advance` after each turn.
    """
    import numpy as np

    image = np.random.default_rng(0).standard_normal(tuple(shape), np.float32)
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(artifact, threads, pinned=True)) for artifact in artifacts]
        return time_sessions(sessions, image, threads, QUICK.with_turns(rounds), advance)
