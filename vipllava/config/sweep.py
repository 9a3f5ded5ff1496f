"""A sweep's jobs: each is a process of its own.

Hydra's basic launcher calls the job's function once per job in one process. There a job would
inherit what the one before it left (seeds, process groups, memory of the device), and Lightning,
which starts its further processes with the command line of the first, would start the whole sweep
again in each of them. So a sweep's job starts ``python train.py`` anew with its own overrides.
Launchers that bring processes of their own (submitit) are left to do so.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from vipllava.types import ConfigError, VipLlavaError

GROUP_VARIABLE: Final = "WANDB_RUN_GROUP"
_DIRNAME: Final = "hydra.job.config.override_dirname"
_OF_THE_SWEEP: Final = (
    _DIRNAME, "hydra.mode", "hydra.sweep", "hydra.launcher", "hydra.run", "hydra.output_subdir",
    "hydra/sweeper", "hydra/launcher",
)  # fmt: skip
"""Hydra's own overrides that describe the sweep and not a job."""
_NUM_VALUES: Final = 10
"""Values at the end of a run whose mean a sweeper compares; one step's loss is too noisy."""


def is_sweep() -> bool:
    """Return whether Hydra runs this process's function as one job of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def with_folder_names(arguments: Sequence[str]) -> list[str]:
    """Name the folders of a sweep's jobs by what differs between them.

    Hydra makes these names of all overrides, and has a list of keys to leave out.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The same; that of a sweep with the list.
    """
    if not {"-m", "--multirun"} & set(arguments) or any(_DIRNAME in a for a in arguments):
        return list(arguments)
    fixed: list[str] = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # an option; or a mistake, which composing will report
        if not override.is_sweep_override():
            fixed.append(override.key_or_group)
    keys = ",".join(QuotedString(key, Quote.single).with_quotes() for key in fixed)
    return [*arguments, f"{_DIRNAME}.exclude_keys=[{keys}]"]


def name_group() -> None:
    """Give all jobs of this sweep one W&B group, the name of the sweep's folder."""
    os.environ.setdefault(GROUP_VARIABLE, Path(HydraConfig.get().sweep.dir).name)


def needs_fresh_process() -> bool:
    """Return whether the launcher would run the job's function in this very process.

    Raises:
        ConfigError: torchrun started this process; each of its processes would run the sweep.
    """
    if not str(HydraConfig.get().launcher.get("_target_", "")).endswith(".BasicLauncher"):
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "a sweep (-m) under torchrun: every process would run all of its jobs. Start it with "
            "`python train.py -m ...` on one node, with hydra/launcher=submitit_slurm, or one job "
            "at a time"
        )
    return True


def job_command(task: Sequence[str], own: Sequence[str], output_dir: str) -> list[str]:
    """Return the command of one job of a sweep.

    Args:
        task: the job's overrides, one value each.
        own: overrides of Hydra's own configuration.
        output_dir: the job's folder.
    """
    kept = [override for override in own if not override.lstrip("+").startswith(_OF_THE_SWEEP)]
    folder = QuotedString(output_dir, Quote.single).with_quotes()
    return [sys.executable, sys.argv[0], *task, *kept, f"hydra.run.dir={folder}"]


def run_in_fresh_process(cfg: DictConfig) -> float | None:
    """Run this job of a sweep in a process of its own and wait for it.

    Returns:
        What a sweeper compares: the mean of the last values of ``cfg.objective``; None where the
        job logged none.

    Raises:
        VipLlavaError: the job failed; its own message stands above. The other jobs still run.
    """
    hydra = HydraConfig.get()
    output_dir = str(hydra.runtime.output_dir)
    task = list(hydra.overrides.task)
    child = subprocess.Popen(job_command(task, list(hydra.overrides.hydra), output_dir))

    stopped = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        child.send_signal(number)

    # Ctrl-C reaches the job from the terminal; what Slurm or `kill` sends has to be handed on.
    before = signal.signal(signal.SIGTERM, forward)
    try:
        code = child.wait()
    except BaseException:
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:  # however well the job ended: the sweep ends with it
        sys.exit(128 + signal.SIGTERM)
    if code:
        raise VipLlavaError(
            f"job {hydra.job.num} of the sweep ({', '.join(task)}) ended with code {code}; its "
            f"messages stand above and in {output_dir}"
        )
    return objective_value(Path(output_dir), str(cfg.get("objective", "train/loss")))


def objective_value(run_dir: Path, metric: str) -> float | None:
    """Return the mean of a run's last values of a metric, or None without a CSV log of it."""
    files = sorted(run_dir.glob("csv/**/metrics.csv"))
    if not files:
        return None
    with files[-1].open(newline="", encoding="utf-8") as file:
        values = [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
    last = values[-_NUM_VALUES:]
    return sum(last) / len(last) if last else None
