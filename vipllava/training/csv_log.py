"""``metrics.csv`` that survives kills: each row is in the file at once, a resumed run goes on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from vipllava.files.atomic import move, write_whole

FILE_NAME: Final = "metrics.csv"


class CsvLog(Logger):
    """Writes one row per step, which later metrics of the step join.

    Lightning's own deletes the file of the run before, which here is the same run.
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
        """There is one: a run is resumed, or its files are moved away."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's folder has the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a step's row, or complete it."""
        exists = self.path.is_file()
        if exists and not self._columns:
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
        if self._row.get("step") != step:
            self._row = {"step": step}
            self._row_start = self.path.stat().st_size if exists else 0
        for name, value in metrics.items():
            self._row[name] = value.item() if hasattr(value, "item") else value
        if self._row.keys() - set(self._columns):
            self._widen()
        try:
            with self.path.open("r+", newline="", encoding="utf-8") as file:
                file.seek(self._row_start)
                file.truncate()
                file.write(_text(self._columns, [self._row]))
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @rank_zero_only
    def save(self) -> None:
        """Bring the rows to the disk, as a checkpoint is."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _widen(self) -> None:
        """Write the file again with more columns; the row at its end is written afterwards."""
        before = self.path.read_bytes() if self.path.is_file() else b""
        rows = csv.DictReader(io.StringIO(before[: self._row_start].decode(), newline=""))
        known = self._row.keys() | set(self._columns)
        self._columns = sorted(known, key=lambda name: (name not in ("epoch", "step"), name))
        write_whole(self.path, _text(self._columns, rows, header=True))
        self._row_start = self.path.stat().st_size


def cut_csv(path: Path, num_steps: int) -> int:
    """Remove the rows of steps behind ``num_steps``, and a row cut short by a kill.

    A file that is no such log gets another name. Returns how many rows are left.
    """
    if not path.is_file():
        return 0
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    columns = list(rows.fieldnames or ())
    if "step" not in columns:
        move(path, path.with_name(f"{path.name}.unreadable"))
        return 0
    whole = (row for row in rows if None not in row and None not in row.values())
    kept = [row for row in whole if row["step"].isdecimal() and int(row["step"]) < num_steps]
    write_whole(path, _text(columns, kept, header=True))
    return len(kept)


def count_rows(path: Path) -> int:
    """Return how many rows of steps ``metrics.csv`` has, 0 if it is not there."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return max(0, sum(1 for _ in file) - 1)


def _text(columns: list[str], rows: Iterable[Mapping[str, Any]], *, header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
