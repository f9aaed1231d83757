"""Says what is being done, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from edgebert_export import processes

__all__ = ["Progress", "Reporter"]

Progress = Callable[[int, int], None]
"""Called with units done and units in all."""

_LINE_EVERY_S = 15.0


class Reporter:
    """Reports the stages of a run, with the time that the current one is still to take.

    Attributes:
        seconds: How long each stage that ran took.
        reused_stages: Stages whose output was there already.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self.reused_stages: list[str] = []

    def line(self, text: str) -> None:
        """Prints a plain line; of several processes, the leader does."""
        if processes.is_leader():
            click.echo(text, err=True)

    def reused(self, name: str) -> None:
        """Notes that a stage's output was there already."""
        self.reused_stages.append(name)
        self.line(f"{name}: reused")

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[Progress]:
        """Announces a stage, yields its progress callback, and says how long it took."""
        self.line(f"{name}: {what}")
        start = time.monotonic()
        if self._console.is_terminal and processes.is_leader():
            with self._bar(name) as progress:
                yield progress
        else:
            yield self._lines(name)
        self.seconds[name] = time.monotonic() - start
        self.line(f"{name}: done in {_duration(self.seconds[name])}")

    @contextmanager
    def _bar(self, name: str) -> Iterator[Progress]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=None)  # it pulses until the work can be counted

            def progress(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield progress

    def _lines(self, name: str) -> Progress:
        first: tuple[int, float] | None = None
        last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal first, last
            now = time.monotonic()
            # From the first call on: loading took its time before, and a resumed run did not do
            # what was done before.
            first = first or (done, now)
            if now - last < _LINE_EVERY_S or done <= first[0]:
                return
            last = now
            left = (now - first[1]) / (done - first[0]) * max(total - done, 0)
            self.line(f"{name}: {done} of {total}, about {_duration(left)} left")

        return progress


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
