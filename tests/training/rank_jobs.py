"""What the trainings share that tests start on real processes; see ``launching.start``.

Each is a module that is started as ``python -m MODULE JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch

from tests.training.toy_training import Loader
from vipllava.types import Batch


class RankJob:
    """A job that a file carries to its processes; its subclasses are dataclasses."""

    def write(self, path: Path) -> None:
        values: Any = self
        path.write_text(json.dumps(asdict(values)))


def read_job(path: str) -> dict[str, Any]:
    """Return what ``RankJob.write`` wrote, and make this process an unobtrusive one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return json.loads(Path(path).read_text())


def leave_rows(folder: str, found: Any) -> None:
    """Write what the first process has found, and leave the group."""
    if os.environ.get("RANK", "0") == "0":
        (Path(folder) / "rows.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class RankLoader(Loader):
    """The micro-batches of one process: every so many of them."""

    def __len__(self) -> int:
        return super().__len__() // int(os.environ.get("WORLD_SIZE", "1"))

    def __iter__(self) -> Iterator[Batch]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        for index, batch in enumerate(super().__iter__()):
            if index % world == rank:
                yield batch


def make_cpu_trainer(folder: str | Path, **options: Any) -> lightning.Trainer:
    """Make a trainer on the CPU that shows nothing and leaves the batches as they are."""
    values = {
        "accelerator": "cpu",
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**values, **options})
