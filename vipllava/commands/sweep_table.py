"""``vipllava sweep-table FOLDER``: the jobs of a sweep beside each other, the best first."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import print_json, print_table
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from rich.table import Table

_METRIC: Final = "train/loss"


@dataclass(frozen=True, slots=True)
class SweepJob:
    """One job of a sweep."""

    overrides: tuple[str, ...]  # those that are not the same in all jobs, ``KEY=VALUE``
    last: float | None  # the metric's last value; None where the job logged none
    best: float | None  # its lowest value
    steps: int  # optimizer steps of the log
    seconds: float | None  # from the job's last start to its last entry in the log
    folder: str  # of the job, relative to the sweep's


def read_sweep(folder: Path, metric: str = _METRIC) -> list[SweepJob]:
    """Read every job below a folder.

    Args:
        folder: the sweep's.
        metric: column of the CSV logs.

    Returns:
        The jobs by the lowest value of the metric; those without one come last.

    Raises:
        VipLlavaError: there is no job, a file cannot be read, or no job logged the metric.
    """
    import yaml

    files = sorted(folder.rglob(".hydra/overrides.yaml"))
    if not files:
        raise VipLlavaError(
            f"{folder} holds no jobs (no .hydra/overrides.yaml below it): name the folder of a "
            "sweep, such as runs/sweeps/tiny-pretrain"
        )
    overrides: list[list[str]] = []
    for file in files:
        read: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        overrides.append([str(override) for override in read or ()])
    shared = set[str]().union(*overrides).intersection(*overrides)
    logged: set[str] = set()
    jobs: list[SweepJob] = []
    for file, own in zip(files, overrides, strict=True):
        job = file.parents[1]
        values, steps, columns, written = _read_metric(job, metric)
        logged |= columns
        # Hydra writes its files when a job starts.
        seconds = None if written is None else max(0.0, written - file.stat().st_mtime)
        jobs.append(
            SweepJob(
                overrides=tuple(o for o in own if o not in shared),
                last=values[-1] if values else None,
                best=min(values, key=_worst_if_not_a_number) if values else None,
                steps=steps,
                seconds=seconds,
                folder=str(job.relative_to(folder)),
            )
        )
    if logged and all(job.best is None for job in jobs):
        raise VipLlavaError(
            f"no job below {folder} logged {metric}; they logged {', '.join(sorted(logged))}"
        )
    return sorted(jobs, key=lambda job: (_worst_if_not_a_number(job.best), job.folder))


def sweep_table(jobs: Sequence[SweepJob], metric: str = _METRIC) -> Table:
    """Return the jobs as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=metric)
    table.add_column("overrides", overflow="fold")
    for name in ("last", "best", "steps", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("folder", overflow="fold")
    for job in jobs:
        table.add_row(
            Text("\n".join(job.overrides) or "-"),
            _number(job.last, "{:.4f}"),
            _number(job.best, "{:.4f}"),
            str(job.steps),
            _number(job.seconds, "{:.0f}"),
            Text(job.folder),
        )
    return table


def print_sweep(
    folder: Annotated[Path, typer.Argument(help="Of a sweep: runs/sweeps/NAME.")],
    metric: Annotated[str, typer.Option(help="What is compared; lower is better.")] = _METRIC,
    as_json: Json = False,
) -> None:
    """Show the jobs of a sweep (train -m), the best first."""

    jobs = read_sweep(folder, metric)
    if as_json:
        print_json([asdict(job) for job in jobs])
    else:
        print_table(sweep_table(jobs, metric))


def _read_metric(job: Path, metric: str) -> tuple[list[float], int, set[str], float | None]:
    """Return a job's values, its steps, the log's columns, and when the log was last written."""
    files = sorted(job.glob("csv/**/metrics.csv"))
    if not files:
        return [], 0, set(), None
    file = files[-1]
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        steps = max((int(row["step"]) + 1 for row in rows if row.get("step")), default=0)
        values = [float(row[metric]) for row in rows if row.get(metric)]
    except (OSError, ValueError) as error:
        raise VipLlavaError(f"{file}: {error}; the log of another program?") from error
    return values, steps, set(rows[0]) if rows else set(), file.stat().st_mtime


def _worst_if_not_a_number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _number(value: float | None, spelling: str) -> str:
    return "-" if value is None else spelling.format(value)
