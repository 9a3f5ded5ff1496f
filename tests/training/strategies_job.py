"""The same training under one strategy in several ways, one after the other; see test_strategies.

Started as ``python -m tests.training.strategies_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.training.rank_jobs import RankJob, RankLoader, leave_rows, make_cpu_trainer, read_job

MICRO_BATCH = 2
CHANGES: dict[str, Any] = {
    "projector_learning_rate": 5e-3,
    "weight_decay": 0.5,
    "betas": (0.5, 0.9),
    "eps": 1e-3,
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        trainable: the parts that train.
        accumulate: micro-batches per optimizer step on each of two processes.
        clip: greatest gradient norm, or None.
        skip: a step that the guard has left out, or None.
        stops: in the middle, and goes on from a checkpoint; one process does if settings change.
        precision: the trainer's.
        fused: two processes have the AdamW of a CUDA run, one process has the other.
        changes: rates, decays and the bound of clipping are others behind the middle.
        steps: how many it takes.
    """

    trainable: list[str]
    accumulate: int
    clip: float | None
    skip: int | None = None
    stops: bool = False
    precision: str = "32-true"
    fused: bool = False
    changes: bool = False
    steps: int = 20

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))


@dataclass(frozen=True)
class Job(RankJob):
    """Cases under one strategy: ``one`` process, or ``ddp``, ``fsdp2``, ``zero2``, ``zero3``."""

    folder: str
    strategy: str
    spec: dict[str, Any]
    cases: list[dict[str, Any]]


def main(path: str) -> None:
    job = Job(**read_job(path))
    found = {}
    for values in job.cases:
        case = Case(**values)
        found[case.name] = _train(job, case)
    leave_rows(job.folder, found)


def _train(job: Job, case: Case) -> list[dict[str, float]]:
    import lightning

    from tests.training.toy_training import Loader, make_samples
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.models.building import ModelSpec
    from vipllava.training import lit_module
    from vipllava.training.csv_log import CsvLog
    from vipllava.training.guard import LossGuard, Refusal
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings, uses_fused_adamw

    class Noting(CsvLog):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append({name: float(value) for name, value in metrics.items()})

    class Skipping(LossGuard):
        num_judged = 0

        def judge(self, loss: float) -> Refusal | None:
            self.num_judged += 1
            if self.num_judged - 1 == case.skip:
                return Refusal("skip", "the test says so")
            return super().judge(loss)

    rows: list[dict[str, float]] = []
    spec = ModelSpec(**job.spec)
    one = job.strategy == "one"
    fused = case.fused and not one
    on = "cuda" if fused else "cpu"
    lit_module.optim.uses_fused_adamw = lambda _, precision: uses_fused_adamw(on, precision)
    tokenizer = load_tokenizer(spec)
    size = 2 * MICRO_BATCH * case.accumulate
    num_epochs = 2 if case.stops else 1
    # Samples 2, 3 and 6, 7 are text only: all that the second process ever gets.
    samples = make_samples(case.steps // num_epochs * size, text_only=lambda i: i % 4 >= 2)
    loader = (Loader if one else RankLoader)(samples, MICRO_BATCH, 2 * case.accumulate)

    def fit(max_epochs: int, checkpoint: Path | None = None) -> lightning.Trainer:
        changed = case.changes and checkpoint is not None
        now = replace(case, clip=0.2) if changed else case
        strategy, weights = ("auto", "float32") if one else make_strategy(job.strategy, now)
        schedule = "constant" if case.stops else "cosine"
        settings = OptimizerSettings(1e-3, schedule=schedule, **(CHANGES if changed else {}))
        module = VipLlavaLitModule(
            replace(spec, dtype=weights),
            case.trainable,
            settings,
            seed=3,
            tokenizer=tokenizer,
            guard=Skipping(),
        )
        trainer = make_cpu_trainer(
            job.folder,
            devices=1 if one else 2,
            strategy=strategy,
            precision=case.precision,
            accumulate_grad_batches=case.accumulate * (2 if one else 1),
            gradient_clip_val=now.clip,
            max_epochs=max_epochs,
            logger=Noting(job.folder),
        )
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        return trainer

    if not case.stops or (one and not case.changes):
        fit(num_epochs)
        return rows
    # DeepSpeed takes brackets in a path for a pattern.
    checkpoint = Path(job.folder) / ("changed.ckpt" if case.changes else "half-way.ckpt")
    fit(1).save_checkpoint(checkpoint)
    fit(2, checkpoint)
    return rows


def make_strategy(name: str, case: Case, devices: int = 2) -> tuple[Any, str]:
    """Make the shipped preset, on gloo, and say which dtype its weights are loaded in."""
    from omegaconf import OmegaConf

    from vipllava.config.composing import compose_job

    clip = "null" if case.clip is None else case.clip
    cfg = compose_job(
        [
            *("model=7b", "trainer=8xa100", f"trainer.devices={devices}", f"strategy={name}"),
            *(f"stage.gradient_clip={clip}", f"machine.micro_batch_size={MICRO_BATCH}"),
            f"stage.global_batch_size={devices * MICRO_BATCH * case.accumulate}",
            f"trainer.precision={case.precision}",
        ]
    )
    preset: Any = OmegaConf.to_container(cfg.strategy.lightning, resolve=True)
    target = preset.pop("_target_")
    if target.endswith("DeepSpeedStrategy"):
        from tests.training.cpu_deepspeed import CpuDeepSpeedStrategy

        strategy = CpuDeepSpeedStrategy
    else:
        from hydra.utils import get_class

        strategy = get_class(target)
    return strategy(**preset, process_group_backend="gloo"), str(cfg.machine.weights_dtype)


if __name__ == "__main__":
    main(sys.argv[1])
