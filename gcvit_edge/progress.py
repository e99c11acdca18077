"""Progress of long steps: bars on a terminal, one line a step elsewhere, and the time that each step took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[], object]


class Steps:
    """Runs named steps one after the other. seconds: time of each finished step, in order. console None is silent."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A step; the body calls what it gets once per unit of `total`."""
        start = time.perf_counter()
        if self.console is not None and self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*(columns if total else (*columns[:2], TimeElapsedColumn())), console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=total)
                yield lambda: bar.advance(task)
        else:
            yield lambda: None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if self.console is not None:
            self.console.print(f"[green]done[/] {name} [dim]{self.seconds[name]:.1f} s[/]", highlight=False)
