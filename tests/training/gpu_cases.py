"""Jobs of one CUDA device, from the project's own configuration: each a few steps of a real run.

``pytest -m gpu`` runs them on a device, ``test_cuda_double`` those that can be on a stand-in.
``python -m tests.training.gpu_cases JOB.yaml`` runs one in a process of its own.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from omegaconf import DictConfig, OmegaConf

from vipllava.config.resolvers import register_resolvers
from vipllava.training.run import run_training

ROOT = Path(__file__).resolve().parents[2]

Compose = Callable[..., DictConfig]
"""Composes a job from overrides; see the fixture ``config``."""

NUM_EPOCHS = 2
NUM_STEPS = 3 * NUM_EPOCHS
"""Ten samples, four a step: two whole global batches and a remainder."""


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
        strategy: of the trainer, on one device.
        precision: the trainer's.
        tuning: ``full``, ``lora`` or ``qlora``.
        attention: ``machine.attn_implementation``.
        packed: rows that several samples share.
        stage: ``finetune`` trains projector and language model, ``pretrain`` the projector.
    """

    strategy: str = "single"
    precision: str = "bf16-mixed"
    tuning: str = "full"
    attention: str = "sdpa"
    packed: bool = False
    stage: str = "finetune"

    def __str__(self) -> str:
        batching = "packed" if self.packed else "padded"
        values = (self.stage, self.strategy, self.precision, self.tuning, self.attention, batching)
        return "-".join(values)

    def overrides(self, sources: object) -> list[str]:
        """Return the command line of the job, without the trainer's name.

        Args:
            sources: has a language model that is wide enough for 4 bits.
        """
        return [
            f"stage={self.stage}",
            "stage.checkpoint=null",
            *([f"strategy={self.strategy}"] * (self.strategy != "single")),
            f"trainer.precision={self.precision}",
            f"tuning={self.tuning}",
            f"machine.attn_implementation={self.attention}",
            f"model.spec.language_model={sources.rows_of_64}",
            # Every step is clipped, and none of them is so high as to be refused.
            *("stage.gradient_clip=0.1", "stage.learning_rate=1e-3"),
            # A run that stops half-way has the rates of one that does not.
            *("stage.schedule=constant", "stage.warmup_ratio=0"),
            *(("data=packed", "stage.max_length=256", "stage.pack_length=256") * self.packed),
        ]


def train(
    case: Case,
    compose: Compose,
    sources: object,
    trainer: str = "1gpu",
    *,
    stops: bool = False,
    in_child: bool = False,
) -> list[float]:
    """Run a job and return the loss of every step.

    Args:
        case: which job.
        compose: see :data:`Compose`; its runs are kept apart by name.
        sources: the networks' folders.
        trainer: ``cpu`` for the reference, whose precision is float32.
        stops: half-way, and goes on from its checkpoint.
        in_child: in processes of their own. DeepSpeed keeps groups for the life of a process, and
            a run leaves them at its end.
    """
    name = f"{case}-{trainer}-{'stopped' if stops else 'whole'}"
    if trainer == "cpu":
        case = replace(case, strategy="single", precision="32-true")
    overrides = [f"trainer={trainer}", *case.overrides(sources), f"name={name}"]
    for num_epochs in (1, NUM_EPOCHS) if stops else (NUM_EPOCHS,):
        cfg = compose(*overrides, f"stage.epochs={num_epochs}")
        with mock.patch.dict(os.environ):  # Lightning leaves a rank and a port for every child
            (_in_child if in_child else run_training)(cfg)
    run_dir = Path(cfg.run_dir)
    assert (run_dir / "export" / "config.json").is_file()
    return losses(run_dir)


def _in_child(cfg: DictConfig) -> None:
    job = Path(cfg.run_dir).with_suffix(".yaml")
    job.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, job, resolve=True)
    command = [sys.executable, "-m", "tests.training.gpu_cases", str(job)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def near(expected: list[float], case: Case) -> Any:
    """Return what half precision may make of float32's losses.

    Packs fall from 6.9 to 0.2 within their steps, some of 0.3 up or down, where rounding has added
    up to 0.06 with LoRA and 0.02 without.
    """
    slack = (0.1 if case.tuning == "lora" else 0.03) if case.packed else None
    return pytest.approx(expected, rel=3e-2, abs=slack)


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every step of a run."""
    with (run_dir / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    register_resolvers()
    loaded = OmegaConf.load(sys.argv[1])
    assert isinstance(loaded, DictConfig)
    run_training(loaded)
