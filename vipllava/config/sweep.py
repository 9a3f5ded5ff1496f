"""A sweep's jobs: each is a process of its own.

Hydra's basic launcher calls the job's function once per job in one process. There a job would
inherit what the one before it left (seeds, process groups, memory of the device), and Lightning,
which starts its further processes with the command line of the first, would start the whole sweep
again in each of them. So a sweep's job starts ``python train.py`` anew with its own overrides, also
in each process of a launcher that queues its jobs (submitit, for Slurm): there it finds its rank in
the queue's variables. What asks the job to stop is handed on; a job that saved because its time is
up, or because others come first, is then queued again by the launcher's own handler.
"""

from __future__ import annotations

import csv
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from vipllava.config.overrides import quoted
from vipllava.processes import EXIT_INTERRUPTED, run_child, shell_code
from vipllava.types import ConfigError, Interrupted, VipLlavaError

_DIRNAME: Final = "hydra.job.config.override_dirname"
_OF_ONE_JOB: Final = "hydra.sweep.dir=${run_dir}"
_OF_THE_SWEEP: Final = (
    _DIRNAME, "hydra.mode", "hydra.sweep", "hydra.launcher", "hydra.run", "hydra.output_subdir",
    "hydra/sweeper", "hydra/launcher",
)  # fmt: skip
"""Hydra's own overrides that describe the sweep and not a job."""
_QUEUE_AGAIN: Final = ("SIGUSR1", "SIGUSR2")
"""What a queue sends before the time is up; by the others a job ends for good."""
_NUM_VALUES: Final = 10
"""Values at the end of a run whose mean a sweeper compares; one step's loss is too noisy."""


def is_sweep() -> bool:
    """Return whether Hydra runs this process's function as one job of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


class NameFolders(Callback):
    """Hydra's callback that names the folders of a sweep's jobs; ``conf/hydra`` has it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Add to the overrides of every job what :func:`folder_overrides` says."""
        own = config.hydra.overrides.hydra
        added = folder_overrides(config.hydra.overrides.task, own)
        with read_write(config):
            own.extend(added)
            if _OF_ONE_JOB in added:
                config.hydra.sweep.dir = "${run_dir}"


def folder_overrides(task: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the overrides by which folders are named by what differs between a sweep's jobs.

    Hydra makes these names of all overrides (``task``; ``own`` are those of its configuration),
    and has a list of keys to leave out. One job that is only to be queued is no sweep: its folder
    is that of the same command without ``-m``.
    """
    if any(_DIRNAME in override for override in own):
        return []
    parsed = OverridesParser.create().parse_overrides(list(task))
    fixed = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    keys = ",".join(map(quoted, fixed))
    of_sweeper = any(o.lstrip("+").startswith(("hydra/sweeper", "hydra.sweep")) for o in own)
    is_sweep = len(fixed) < len(parsed) or of_sweeper
    return [f"{_DIRNAME}.exclude_keys=[{keys}]", *([] if is_sweep else [_OF_ONE_JOB])]


def _is_queued() -> bool:
    """Return whether the launcher brings processes of its own."""
    return not str(HydraConfig.get().launcher.get("_target_", "")).endswith(".BasicLauncher")


def job_command(
    program: Sequence[str], task: Sequence[str], own: Sequence[str], output_dir: str
) -> list[str]:
    """Return the command of one job of a sweep; its parts as in :func:`run_in_fresh_process`."""
    kept = [override for override in own if not override.lstrip("+").startswith(_OF_THE_SWEEP)]
    return [*program, *task, *kept, f"hydra.run.dir={quoted(output_dir)}"]


def run_in_fresh_process(cfg: DictConfig, program: Sequence[str]) -> float | None:
    """Run this job of a sweep in a process of its own and wait for it.

    Args:
        cfg: the job.
        program: the words that start the entry point.

    Returns:
        What a sweeper compares: the mean of the last values of ``cfg.objective``; None where the
        job logged none.

    Raises:
        ConfigError: torchrun started this process; each of its processes would run the sweep.
        VipLlavaError: the job failed; its own message stands above. The other jobs still run.
    """
    if not _is_queued() and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "a sweep (-m) under torchrun: every process would run all of its jobs. Start it with "
            "`python train.py -m ...` on one node, with hydra/launcher=slurm, or one job at a time"
        )
    hydra = HydraConfig.get()
    # All jobs of this sweep are one W&B group, which has the name of the sweep's folder.
    os.environ.setdefault("WANDB_RUN_GROUP", Path(hydra.sweep.dir).name)
    output_dir = str(hydra.runtime.output_dir)
    task, own = list(hydra.overrides.task), list(hydra.overrides.hydra)
    code, asked_by = run_child(job_command(program, task, own, output_dir))
    if asked_by is not None:
        _end_as_asked(code, asked_by)
    if code and _is_queued():
        sys.exit(code)  # the queue has to see it, to end the job's other processes
    if code:
        raise VipLlavaError(
            f"job {hydra.job.num} of the sweep ({', '.join(task)}) ended with code {code}; its "
            f"messages stand above and in {output_dir}"
        )
    return objective_value(Path(output_dir), str(cfg.get("objective", "train/loss")))


def _end_as_asked(code: int, asked_by: signal.Signals) -> None:
    """End the sweep with its job; where a queue asked, let the launcher queue the job again."""
    if not _is_queued():
        stopped = EXIT_INTERRUPTED if asked_by == signal.SIGINT else Interrupted.exit_code
        sys.exit(shell_code(code) or stopped)  # a job that was about to end is not the last one
    if asked_by.name not in _QUEUE_AGAIN:
        if code:  # one process tells the queue; another may still be saving
            sys.exit(128 + asked_by)
        return
    if code not in (Interrupted.exit_code, -asked_by):  # done, or failed for a reason of its own
        return
    handler = signal.getsignal(asked_by)
    if callable(handler):
        handler(asked_by, None)  # submitit's: writes down what to run, queues it, and exits
    sys.exit(Interrupted.exit_code)


def objective_value(run_dir: Path, metric: str) -> float | None:
    """Return the mean of a run's last values of a metric, or None without a CSV log of it."""
    values: list[float] = []
    for path in sorted(run_dir.glob("csv/**/metrics.csv"))[-1:]:
        with path.open(newline="", encoding="utf-8") as file:
            values = [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
    return statistics.fmean(values[-_NUM_VALUES:]) if values else None
