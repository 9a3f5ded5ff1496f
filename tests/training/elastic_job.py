"""Halves of one training, each on the processes that are there; see test_elastic.

Started as ``python -m tests.training.elastic_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

from tests.training.rank_jobs import RankJob, RankLoader, leave_rows, make_cpu_trainer, read_job
from tests.training.strategies_job import MICRO_BATCH, Case, make_strategy

MICRO_BATCHES = 6
"""Of a global batch: one, two or three processes share them."""
STEPS_OF_HALF = 4
TRAINABLE = ["projector", "language_model"]


@dataclass(frozen=True)
class Half:
    """The first epoch or the second one.

    Attributes:
        strategy: ``one`` process without any, or the name of a preset.
        begins: checkpoint to go on from; None: the first half.
        ends: checkpoint to write; None: none.
        precision: the trainer's.
        persist: greatest number of elements of a weight that ZeRO-3 leaves whole on every process.
    """

    strategy: str
    begins: str | None = None
    ends: str | None = None
    precision: str = "32-true"
    persist: int = 0


@dataclass(frozen=True)
class Job(RankJob):
    """Halves on the same processes, one after the other; ``folder`` gets ``rows.json``."""

    folder: str
    spec: dict[str, Any]
    halves: list[dict[str, Any]]


def main(path: str) -> None:
    job = Job(**read_job(path))
    found = [_train(job, Half(**half)) for half in job.halves]
    leave_rows(job.folder, found)


def _train(job: Job, half: Half) -> dict[str, Any]:
    from tests.training.toy_training import make_samples
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.models.building import ModelSpec
    from vipllava.training.csv_log import CsvLog
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings
    from vipllava.types import CheckpointError

    world = int(os.environ.get("WORLD_SIZE", "1"))

    class Noting(CsvLog):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            names = ("train/loss", "train/grad_norm", "train/lr")
            rows.append([float(metrics[name]) for name in names if name in metrics])

    rows: list[list[float]] = []
    spec = ModelSpec(**job.spec)
    accumulate = MICRO_BATCHES // world
    strategy: Any = "auto"
    weights = "float32"
    if half.strategy != "one":
        case = Case(TRAINABLE, accumulate, 0.5, precision=half.precision)
        strategy, weights = make_strategy(half.strategy, case, world)
        if half.strategy.startswith("zero3"):
            zero = strategy.config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = half.persist
            zero["sub_group_size"] = 5000  # several flat tensors
    tokenizer = load_tokenizer(spec)
    samples = make_samples(STEPS_OF_HALF * MICRO_BATCHES * MICRO_BATCH)
    module = VipLlavaLitModule(
        replace(spec, dtype=weights), TRAINABLE,
        OptimizerSettings(1e-3, 3e-3, weight_decay=0.1, schedule="constant"),
        seed=3, tokenizer=tokenizer,
    )  # fmt: skip
    precision: Any = half.precision
    trainer: Any = make_cpu_trainer(
        job.folder,
        devices=world,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        max_epochs=1 if half.ends else 2,
        logger=Noting(job.folder),
    )
    if half.precision == "16-mixed":
        strategy.loss_scale_window = 3  # the scale changes, and overflows follow
    found: dict[str, Any] = {"rows": rows, "error": None}
    try:
        loader = RankLoader(samples, MICRO_BATCH, MICRO_BATCHES)
        trainer.fit(module, loader, ckpt_path=half.begins, weights_only=True)
    except CheckpointError as error:
        found["error"] = str(error)
        return found
    if half.precision == "16-mixed":
        scaler = trainer.strategy.deepspeed_engine.optimizer.loss_scaler
        found["scaling"] = [scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter]
    if half.ends:
        trainer.save_checkpoint(half.ends)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
