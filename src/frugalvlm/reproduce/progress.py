"""Progress bars of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress(console: Console) -> Iterator[Bars]:
    """Progress bars on a terminal: one for the whole, one for the run under way."""
    bar = Progress(
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with bar:
        yield Bars(bar)


class Bars:
    """A `Reporter` over rich's progress display: the run under way, finished ones vanish."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task: Any = None

    def start(self, description: str, total: int) -> None:
        """A run begins: its bar takes the place of the last one's."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(description, total=total)

    def advance(self, steps: int) -> None:
        """So many questions or rounds are done.

        A total is what was asked for; whole pictures may bring a few questions more, and then the
        total grows rather than that 21 of 20 are done.
        """
        self.bar.advance(self.task, steps)
        shown = next(task for task in self.bar.tasks if task.id == self.task)
        if shown.total is not None and shown.completed > shown.total:
            self.bar.update(self.task, total=shown.completed)
