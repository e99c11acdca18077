"""Warm-up, modes and the order of turns, on a session that takes as long as it is told."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat

import numpy as np
import pytest
from numpy.typing import NDArray

from gcvit_edge.measurement.timing import MODES, QUICK, SINGLE_STREAM, Mode, Timing, time_sessions, warm_up
from gcvit_edge.targets import Session, Timed

IMAGE = np.zeros((1, 3, 8, 8), np.float32)


class Scripted(Session):
    """Says that inferences took the given milliseconds, then the last of them for ever. log: where it notes its turns."""

    runtime, runtime_version, load_ms, runtime_rss_mb = "scripted", "1.0", 7.0, 50.0

    def __init__(self, ms: Sequence[float], log: list[tuple[str, int, int]], name: str = "a") -> None:
        self._ms: Iterator[float] = chain(ms, repeat(ms[-1]))
        self._log, self._name = log, name

    def infer(self, images: NDArray[np.float32], advance: Callable[[], object]) -> NDArray[np.float32]:
        raise NotImplementedError

    def time(self, image: NDArray[np.float32], runs: int, untimed: int = 0) -> Timed:
        self._log.append((self._name, untimed, runs))
        for _ in range(untimed):
            next(self._ms)
        sometimes = {} if len(self._log) % 2 else {"VDD_IN": 1.0}  # a rail that not every turn can tell
        return Timed(tuple(next(self._ms) for _ in range(runs)), {"package-0": 0.5 * runs} | sometimes)

    def peak_rss_mb(self) -> float:
        return 60.0

    def close(self) -> None:
        pass


def timing(samples: Sequence[float]) -> Timing:
    return Timing(1, 1.0, 1.0, tuple(samples), 1.0, 1.0, 10, True, {})


def test_warm_up_ends_when_two_windows_agree() -> None:
    assert warm_up(Scripted([10.0], []), IMAGE) == (10, True)
    assert warm_up(Scripted([*[30.0] * 5, *[20.0] * 5, *[10.0] * 5], []), IMAGE) == (20, True)


@pytest.mark.parametrize(("after", "stable"), [(0.971, True), (0.969, False), (1.029, True), (1.031, False)])
def test_windows_agree_within_three_percent(after: float, stable: bool) -> None:
    runs, agreed = warm_up(Scripted([*[20.0] * 5, *[20 * after] * 5, 20 * after * 2], []), IMAGE)
    assert agreed
    assert (runs == 10) is stable


def test_warm_up_has_a_cap() -> None:
    ever_faster = [1000 * 0.95 ** (i // 5) for i in range(200)]
    assert warm_up(Scripted(ever_faster, []), IMAGE) == (100, False)


def test_first_inference_and_warm_up_are_no_samples() -> None:
    (result,) = time_sessions([Scripted([100.0, *[9.0] * 10, 3.0], [])], IMAGE, 1, Mode("quick", 6, 0, 3, True, 50), lambda: None)
    assert result.first_ms == 100
    assert result.warm_up_runs == 10
    assert result.samples == (3.0,) * 6
    assert result.joules == {"package-0": 3.0}
    assert (result.load_ms, result.runtime_rss_mb, result.peak_rss_mb) == (7, 50, 60)


def test_artifacts_take_turns() -> None:
    log: list[tuple[str, int, int]] = []
    turns: list[int] = []
    mode = Mode("quick", 4, 0, 2, True, 50)
    time_sessions([Scripted([1.0], log, "a"), Scripted([2.0], log, "b")], IMAGE, 1, mode, lambda: turns.append(1))
    assert log[-4:] == [("a", 1, 2), ("b", 1, 2)] * 2
    assert len(turns) == 4 == 2 * mode.turns


@pytest.mark.parametrize("count", [1, 2])  # alone, the pause is the way to the device and back
def test_the_first_inference_after_a_pause_is_no_sample(count: int) -> None:
    after_pauses = [100.0, *[9.0] * 10, *[12.0, 9.0, 9.0] * 4]
    results = time_sessions([Scripted(after_pauses, []) for _ in range(count)], IMAGE, 1, Mode("quick", 8, 0, 2, True, 50), lambda: None)
    assert [result.samples for result in results] == [(9.0,) * 8] * count
    assert not results[0].noisy


def test_single_stream_needs_both_the_queries_and_the_time() -> None:
    (quick,) = time_sessions([Scripted([1.0], [])], IMAGE, 1, SINGLE_STREAM, lambda: None)
    assert sum(quick.samples) >= 60_000
    (slow,) = time_sessions([Scripted([500.0], [])], IMAGE, 1, SINGLE_STREAM, lambda: None)
    assert len(slow.samples) == 1024


def test_modes() -> None:
    """As docs/devices.md has them."""
    assert MODES == {"quick": QUICK, "single-stream": SINGLE_STREAM}
    assert Mode("quick", min_runs=150, min_seconds=0, runs_a_turn=5, together=True, score=50) == QUICK
    assert Mode("single-stream", min_runs=1024, min_seconds=60, runs_a_turn=32, together=False, score=90) == SINGLE_STREAM
    assert QUICK.with_turns(4).turns == 4
    assert QUICK.with_turns(4).min_runs == 4 * QUICK.runs_a_turn


@pytest.mark.parametrize(("slow", "noisy"), [(10, False), (30, True)])
def test_noisy_when_one_in_ten_is_much_slower(slow: int, noisy: bool) -> None:
    result = timing([10.0] * 85 + [10.0 * (1 + slow / 100)] * 15)
    assert result.spread == pytest.approx(slow / 100)
    assert result.noisy is noisy


def test_the_report_has_percentiles_and_the_spread_of_the_samples() -> None:
    result = Timing(2, 1.26, 3.456, tuple(float(ms) for ms in range(101)), 60.04, 50.06, 10, True, {})
    assert result.report() == {
        "load_ms": 1.3, "first_ms": 3.46, "latency_ms": {"p50": 50.0, "p90": 90.0, "p99": 99.0}, "timed_runs": 101, "spread": 0.8,
        "noisy": True, "stable": True, "threads": 2, "peak_rss_mb": 60.0, "runtime_rss_mb": 50.1,
    }  # fmt: skip
