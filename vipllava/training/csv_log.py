"""``metrics.csv`` that survives kills: each row is in the file at once, a resumed run goes on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from vipllava.files.atomic import write_whole

FILE_NAME: Final = "metrics.csv"
_FIRST: Final = ("epoch", "step")


class CsvLog(Logger):
    """Writes one row per step; metrics of one step that come later join its row.

    Lightning's own deletes the file of the run before, which here is the same run.

    Args:
        folder: of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILE_NAME
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one version: a run is resumed, or its files are moved away."""
        return ""

    @property
    def log_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's folder has the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a step's row, or complete it."""
        if not self._columns and self.path.is_file():
            self._continue()
        if self._row.get("step") != step:
            self._row = {"step": step}
            self._row_start = self.path.stat().st_size if self.path.is_file() else 0
        self._row |= {name: _number(value) for name, value in metrics.items()}
        new = [name for name in self._row if name not in self._columns]
        if new:
            self._widen(new)
        try:
            with self.path.open("r+", newline="", encoding="utf-8") as file:
                file.seek(self._row_start)
                file.truncate()
                file.write(_line([self._row.get(name, "") for name in self._columns]))
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @rank_zero_only
    def save(self) -> None:
        """Bring the rows to the disk, as a checkpoint is."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _continue(self) -> None:
        with self.path.open(newline="", encoding="utf-8") as file:
            self._columns = next(csv.reader(file), [])

    def _widen(self, names: list[str]) -> None:
        """Write the file again with more columns; the row at its end is written afterwards."""
        rows: list[dict[str, str]] = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                text = file.read(self._row_start).decode()
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        known = set(self._columns) | set(names)
        first = [name for name in _FIRST if name in known]
        self._columns = [*first, *sorted(known - set(_FIRST))]
        lines = [_line(self._columns)]
        lines += [_line([row.get(name, "") for name in self._columns]) for row in rows]
        write_whole(self.path, "".join(lines))
        self._row_start = self.path.stat().st_size


def cut_csv(path: Path, num_steps: int) -> None:
    """Remove the rows of steps that a run is going to do again, and a row cut short by a kill.

    Args:
        path: of ``metrics.csv``; nothing happens if it is not there.
        num_steps: steps that the checkpoint has done; their rows stay.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole, newline="")))
    if not rows or "step" not in rows[0]:
        path.unlink()
        return
    column = rows[0].index("step")
    kept = [
        row
        for row in rows[1:]
        if len(row) == len(rows[0]) and row[column].isdecimal() and int(row[column]) < num_steps
    ]
    write_whole(path, "".join(map(_line, [rows[0], *kept])))


def count_rows(path: Path) -> int:
    """Return how many rows of steps ``metrics.csv`` has, 0 if it is not there."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return max(0, sum(1 for _ in file) - 1)


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _line(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
