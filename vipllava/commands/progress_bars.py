"""Progress of long commands on the terminal's error stream; tables and JSON stay on the other."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressBars:
    """One bar per task; call it with the task's name, unit, done and total.

    ``bytes`` are written as such, any other unit is counted. A finished bar stays as one line.
    Nothing is drawn where no terminal is: a log file is no place for bars.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True, quiet=not sys.stderr.isatty()),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, unit: str, done: int, total: int | None) -> None:
        """Say how far a task is."""
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, amount="")
        amount = _amount(unit, done, total)
        self._progress.update(self._tasks[task], completed=done, total=total, amount=amount)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they are."""
        self._progress.stop()


def _amount(unit: str, done: int, total: int | None) -> str:
    if unit == "bytes":
        return decimal(done) if total is None else f"{decimal(done)} of {decimal(total)}"
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
