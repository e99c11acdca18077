"""Progress of long steps: bars on a terminal, a line at the start and the end of each elsewhere, and the time that each step took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gcvit_edge.interruption import raise_interruption

Advance = Callable[[], object]


class Bar:
    """A step under way: called once per unit; `note` says how it goes, beside its name."""

    def __init__(self, name: str, progress: Progress | None = None, total: int | None = None, done: int = 0) -> None:
        self.text = self._name = escape(name)
        self._progress = progress
        self._task = None if progress is None else progress.add_task(self.text, total=total, completed=done)

    def __call__(self) -> None:
        raise_interruption()
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)
            if not self._progress.live.auto_refresh:
                self._progress.refresh()

    def note(self, text: str) -> None:
        self.text = f"{self._name}: {escape(text)}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=self.text)


class Steps:
    """Runs named steps one after the other. seconds: time of each finished step, in order. console None is silent."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int | None = None, done: int = 0, *, timed: bool = False) -> Iterator[Bar]:
        """A step; the body calls what it gets once per unit of `total`, of which `done` were done before. timed: something is timed in it,
        on this machine perhaps, so the bar is drawn in those calls alone, and not ten times a second beside it."""
        raise_interruption()
        start = time.perf_counter()
        if self.console is not None and self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            shown = columns if total else (*columns[:2], TimeElapsedColumn())
            with Progress(*shown, console=self.console, transient=True, auto_refresh=not timed) as progress:
                bar = Bar(name, progress, total, done)
                yield bar
        else:
            if self.console is not None:
                self.console.print(f"{escape(name)} ...", highlight=False)
            bar = Bar(name)
            yield bar
        raise_interruption()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if self.console is not None:
            self.console.print(f"[green]done[/] {bar.text} [dim]{self.seconds[name]:.1f} s[/]", highlight=False)
