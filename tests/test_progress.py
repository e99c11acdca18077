"""Progress: two lines a step off a terminal, the note behind its name; bars on one."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from rich.console import Console

from gcvit_edge.progress import Bar, Steps


def test_two_lines_a_step_with_its_last_note() -> None:
    out = io.StringIO()
    steps = Steps(Console(file=out, width=100))
    with steps.step("read", 2) as bar:
        assert out.getvalue() == "read ...\n"
        bar()
        bar()
    with steps.step("epoch 1 of 2", 10, done=4) as bar:
        bar.note("loss 2.0")
        bar.note("loss 1.5 [red]")
        bar()
    _, first, begun, second = out.getvalue().splitlines()
    assert begun == "epoch 1 of 2 ..."
    assert first.startswith("done read 0.")
    assert second.startswith("done epoch 1 of 2: loss 1.5 [red] 0.")
    assert list(steps.seconds) == ["read", "epoch 1 of 2"]


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with Steps(Console(file=out, width=100, force_terminal=True)).step("epoch", 10, done=4) as bar:
        bar.note("loss 1.5")
        for _ in range(6):
            bar()
    assert "epoch: loss 1.5" in out.getvalue()
    assert "10/10" in out.getvalue()


def test_beside_what_is_timed_nothing_is_drawn_but_between_its_units() -> None:
    out = io.StringIO()
    with Steps(Console(file=out, width=100, force_terminal=True)).step("time", 2, timed=True) as bar:
        begun = out.getvalue()
        time.sleep(0.5)  # five times as long as between two drawings of other bars
        assert out.getvalue() == begun
        bar()
        assert "1/2" in out.getvalue()


def test_an_interruption_that_was_lost_is_raised_at_the_next_unit_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Event()
    monkeypatch.setattr("gcvit_edge.interruption.interrupted", told)
    steps, bar = Steps(), Bar("read")
    bar()
    with pytest.raises(KeyboardInterrupt), steps.step("read"):
        told.set()
    with pytest.raises(KeyboardInterrupt):
        bar()
    with pytest.raises(KeyboardInterrupt), steps.step("next"):
        pytest.fail("the next step was begun")
    assert steps.seconds == {}
    others = ThreadPoolExecutor(1).submit(bar)  # a thread of ours must not end by what is meant for the main one
    assert others.exception() is None


def test_silence() -> None:
    steps = Steps()
    with steps.step("read") as bar:
        bar()
        bar.note("all is well")
    assert list(steps.seconds) == ["read"]
