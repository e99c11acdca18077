"""How artifacts are timed, on whatever target: warm-up until stable, then one of two modes."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gcvit_edge.targets import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WARM_UP_WINDOW = 5  # runs
MAX_WARM_UP_WINDOWS = 20
STABLE_WITHIN = 0.03  # between the medians of two successive windows
MAX_SPREAD = 0.15  # above it, a machine counts as noisy
_SETTLE_SECONDS = 0.03  # idle threads of ONNX Runtime spin for a while; the next process must not be timed meanwhile


@dataclass(frozen=True)
class Mode:
    """How much is timed. min_runs, min_seconds: of each artifact, both reached. runs_a_turn: without a pause. together: all
    artifacts are loaded and take turns, so that a slow minute of the machine hits all alike; else one after the other. score:
    the percentile that an artifact is judged by."""

    name: str
    min_runs: int
    min_seconds: float
    runs_a_turn: int
    together: bool
    score: int

    @property
    def turns(self) -> int:
        """Turns of an artifact, unless `min_seconds` asks for more."""
        return math.ceil(self.min_runs / self.runs_a_turn)

    def with_turns(self, turns: int) -> "Mode":
        """The same with another number of turns."""
        return replace(self, min_runs=turns * self.runs_a_turn)


QUICK = Mode("quick", min_runs=150, min_seconds=0, runs_a_turn=5, together=True, score=50)
# As the single stream of MLPerf Inference (LoadGen): a query when the last one ended, at least 1,024, and the 90th percentile; 60 s where
# its rules ask for 600.
SINGLE_STREAM = Mode("single-stream", min_runs=1024, min_seconds=60, runs_a_turn=32, together=False, score=90)
MODES = {mode.name: mode for mode in (QUICK, SINGLE_STREAM)}


@dataclass(frozen=True)
class Timing:
    """Of one artifact in one process. first_ms: the first inference. samples: milliseconds of every timed inference;
    percentiles are of these. joules: by power rail, over all samples. stable: warm-up ended because two windows agreed."""

    threads: int
    load_ms: float
    first_ms: float
    samples: tuple[float, ...]
    peak_rss_mb: float
    runtime_rss_mb: float
    warm_up_runs: int
    stable: bool
    joules: dict[str, float]

    def percentile(self, q: float) -> float:
        """Percentile `q` (0 to 100) of the latency in milliseconds."""
        import numpy as np

        return float(np.percentile(self.samples, q))

    def report(self) -> dict[str, Any]:
        """What the report of a bundle says of it."""
        return {
            "load_ms": round(self.load_ms, 1),
            "first_ms": round(self.first_ms, 2),
            "latency_ms": {f"p{q}": round(self.percentile(q), 3) for q in (50, 90, 99)},
            "timed_runs": len(self.samples),
            "spread": round(self.spread, 3),
            "noisy": self.noisy,
            "stable": self.stable,
            "threads": self.threads,
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "runtime_rss_mb": round(self.runtime_rss_mb, 1),
        }

    @property
    def spread(self) -> float:
        """(p90 - p50) / p50: 0.1 says that one inference in ten takes at least 10 % longer than the median."""
        return self.percentile(90) / self.percentile(50) - 1

    @property
    def noisy(self) -> bool:
        """Whether the spread is past the limit: something else ran on the machine, or its clock changed."""
        return self.spread > MAX_SPREAD


def warm_up(session: Session, image: "NDArray[np.float32]") -> tuple[int, bool]:
    """Runs until the medians of two successive windows agree, or the cap is reached; returns the runs and whether they agreed."""
    before = statistics.median(session.time(image, WARM_UP_WINDOW).ms)
    for window in range(2, MAX_WARM_UP_WINDOWS + 1):
        after = statistics.median(session.time(image, WARM_UP_WINDOW).ms)
        if abs(after - before) <= STABLE_WITHIN * before:
            return window * WARM_UP_WINDOW, True
        before = after
    return MAX_WARM_UP_WINDOWS * WARM_UP_WINDOW, False


def time_sessions(
    sessions: Sequence[Session], image: "NDArray[np.float32]", threads: int, mode: Mode, advance: Callable[[], object]
) -> list[Timing]:
    """Times fresh sessions on `image` (1, C, H, W) in turns, whatever `mode.together` says. Calls `advance` after each turn.

    After a pause, an inference takes up to a quarter longer than the next one, so the first of a turn is not timed. It is part of the
    turn: to ask for it alone would be another pause, on a device that is reached by a network a long one.
    """
    first = [session.time(image, 1).ms[0] for session in sessions]
    warmed = [warm_up(session, image) for session in sessions]
    samples: list[list[float]] = [[] for _ in sessions]
    joules: list[list[dict[str, float]]] = [[] for _ in sessions]
    unfinished = list(range(len(sessions)))
    while unfinished:
        for index in list(unfinished):
            if len(sessions) > 1:
                time.sleep(_SETTLE_SECONDS)
            timed = sessions[index].time(image, mode.runs_a_turn, untimed=1)
            samples[index] += timed.ms
            joules[index].append(timed.joules)
            if len(samples[index]) >= mode.min_runs and sum(samples[index]) >= 1000 * mode.min_seconds:
                unfinished.remove(index)
            advance()
    return [
        Timing(threads, s.load_ms, first[i], tuple(samples[i]), s.peak_rss_mb(), s.runtime_rss_mb, *warmed[i], _total(joules[i]))
        for i, s in enumerate(sessions)
    ]


def _total(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum over all turns of each power rail that none of them lacks."""
    return {rail: sum(turn[rail] for turn in turns) for rail in turns[0] if all(rail in turn for turn in turns)}
