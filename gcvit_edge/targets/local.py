"""This machine: every artifact runs in a fresh process of its own, so that no runtime disturbs another."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Artifact
from gcvit_edge.data import Pixels, Preprocessing
from gcvit_edge.errors import CheckFailed

WARM_UP_RUNS = 10
RUNS_A_ROUND = 5
_SETTLE_SECONDS = 0.03  # idle threads of ONNX Runtime spin for a while; the next process must not be timed meanwhile


def default_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Session:
    """One artifact in a fresh process. load_ms: time to load it, runtime imported before. runtime_rss_mb: memory before."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        """Starts the process and loads the artifact.

        Raises:
            CheckFailed: the runtime cannot load it; the message ends with what the runtime printed.
        """
        self.artifact, self.threads = artifact, threads
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by __exit__
        command = [sys.executable, "-m", "gcvit_edge.targets._worker", artifact.backend, str(artifact.path.resolve()), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        ready = self._read()
        self.load_ms: float = ready["load_ms"]
        self.runtime_rss_mb: float = ready["runtime_rss_mb"]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def run(
        self, pixels: Pixels, preprocessing: Preprocessing, start: int, stop: int, advance: Callable[[], object]
    ) -> NDArray[np.float32]:
        """Logits (stop - start, classes) of the images from `start` to `stop`; calls `advance` after each."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "logits.npy"
            self._send(do="run", pixels=str(pixels.file), preprocessing=preprocessing.model_dump(), start=start, stop=stop, out=str(out))
            while "finished" not in self._read():
                advance()
            return np.load(out)

    def replay(self, inputs: Path) -> NDArray[np.float32]:
        """Logits (N, classes) of the network inputs (N, C, H, W) in the .npy file `inputs`."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "logits.npy"
            self._send(do="replay", inputs=str(inputs.resolve()), out=str(out))
            self._read()
            return np.load(out)

    def time(self, shape: Sequence[int], runs: int) -> list[float]:
        """Milliseconds of each of `runs` inferences of one input of `shape`."""
        self._send(do="time", shape=list(shape), runs=runs)
        return self._read()["ms"]

    def peak_rss_mb(self) -> float:
        """Highest memory of the process so far, Python and runtime included, in MB."""
        self._send(do="memory")
        return self._read()["peak_rss_mb"]

    def _send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        code = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-15:])
        raise CheckFailed(f"{self.artifact.path.name} does not run in {self.artifact.backend} (process ended with {code}):\n{tail}")


def run_artifacts(
    artifacts: Sequence[Artifact], pixels: Pixels, preprocessing: Preprocessing, advance: Callable[[], object]
) -> list[NDArray[np.float32]]:
    """Logits (N, classes) of every artifact on all images. Side by side, one thread each: the most images a second."""
    count = len(pixels.kept)

    def run(artifact: Artifact) -> NDArray[np.float32]:
        with Session(artifact, threads=1) as session:
            return session.run(pixels, preprocessing, 0, count, advance)

    with ThreadPoolExecutor(default_threads()) as pool:
        return list(pool.map(run, artifacts))


@dataclass(frozen=True)
class Timing:
    """Of one artifact in one process. samples: milliseconds of every timed inference; percentiles are of these."""

    threads: int
    load_ms: float
    first_ms: float
    samples: tuple[float, ...]
    peak_rss_mb: float
    runtime_rss_mb: float

    def percentile(self, q: float) -> float:
        """Percentile `q` (0 to 100) of the latency in milliseconds."""
        return float(np.percentile(self.samples, q))


def time_artifacts(
    artifacts: Sequence[Artifact], shape: Sequence[int], threads: int, rounds: int, advance: Callable[[], object]
) -> list[Timing]:
    """Times every artifact on inputs of `shape`: all loaded, then in turn, `rounds` times a few inferences each, so that a slow
    minute of the machine hits all alike. Calls `advance` after each turn."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(artifact, threads)) for artifact in artifacts]
        first = [session.time(shape, 1)[0] for session in sessions]
        for session in sessions:
            session.time(shape, WARM_UP_RUNS)
        samples: list[list[float]] = [[] for _ in sessions]
        for _ in range(rounds):
            for index, session in enumerate(sessions):
                time.sleep(_SETTLE_SECONDS)
                samples[index] += session.time(shape, RUNS_A_ROUND)
                advance()
        return [
            Timing(threads, s.load_ms, first[i], tuple(samples[i]), s.peak_rss_mb(), s.runtime_rss_mb) for i, s in enumerate(sessions)
        ]
