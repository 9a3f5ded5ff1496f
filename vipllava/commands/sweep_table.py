"""``vipllava sweep-table FOLDER``: the jobs of a sweep beside each other, the best first."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vipllava.commands.options import Json
from vipllava.commands.output import print_json, print_table, rows_table
from vipllava.types import VipLlavaError

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


def read_jobs(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Return the folder of every job below a sweep's, and its overrides that not all jobs have.

    Raises:
        VipLlavaError: there is none.
    """
    import yaml

    files = sorted(folder.rglob(".hydra/overrides.yaml"))
    if not files:
        raise VipLlavaError(
            f"{folder} holds no jobs (no .hydra/overrides.yaml below it): name the folder of a "
            "sweep, such as runs/sweeps/tiny-pretrain"
        )
    read: list[Any] = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    overrides = [[str(override) for override in own or ()] for own in read]
    shared = set[str]().union(*overrides).intersection(*overrides)
    different = [tuple(override for override in own if override not in shared) for own in overrides]
    return list(zip([file.parents[1] for file in files], different, strict=True))


def read_sweep(folder: Path, metric: str = _METRIC) -> list[SweepJob]:
    """Read every job below a sweep's folder.

    Returns:
        The jobs by the lowest value of the metric, a column of their CSV logs; those without one
        come last.

    Raises:
        VipLlavaError: there is no job, a file cannot be read, or no job logged the metric.
    """
    logged: set[str] = set()
    jobs: list[SweepJob] = []
    for job, different in read_jobs(folder):
        values, steps, seconds = list[float](), 0, None
        for log in sorted(job.glob("csv/**/metrics.csv"))[-1:]:
            try:
                rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))
                steps = max((int(row["step"]) + 1 for row in rows if row.get("step")), default=0)
                values = [float(row[metric]) for row in rows if row.get(metric)]
            except (OSError, ValueError) as error:
                raise VipLlavaError(f"{log}: {error}; the log of another program?") from error
            logged.update(*rows[:1])
            # Hydra writes its files when a job starts.
            start = job / ".hydra" / "overrides.yaml"
            seconds = max(0.0, log.stat().st_mtime - start.stat().st_mtime)
        last = values[-1] if values else None
        best = min(values, key=_worst_if_not_a_number, default=None)
        place = str(job.relative_to(folder))
        jobs.append(SweepJob(different, last, best, steps, seconds, place))
    if logged and all(job.best is None for job in jobs):
        raise VipLlavaError(
            f"no job below {folder} logged {metric}; they logged {', '.join(sorted(logged))}"
        )
    return sorted(jobs, key=lambda job: (_worst_if_not_a_number(job.best), job.folder))


def print_sweep(
    folder: Annotated[Path, typer.Argument(help="Of a sweep: runs/sweeps/NAME.")],
    metric: Annotated[str, typer.Option(help="What is compared; lower is better.")] = _METRIC,
    as_json: Json = False,
) -> None:
    """Show the jobs of a sweep (train -m), the best first."""
    jobs = read_sweep(folder, metric)
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    rows: list[tuple[str, ...]] = []
    for job in jobs:
        values = (_number(job.last, 4), _number(job.best, 4), str(job.steps))
        overrides = "\n".join(job.overrides) or "-"
        rows.append((overrides, *values, _number(job.seconds, 0), job.folder))
    numbers = ("last", "best", "steps", "seconds")
    headers, spare = ("overrides", *numbers, "folder"), ("folder", "seconds", "steps", "last")
    print_table(rows_table(metric, headers, rows, right=numbers, spare=spare))


def _worst_if_not_a_number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
