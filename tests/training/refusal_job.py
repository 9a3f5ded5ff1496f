"""A training whose gradient overflows once, under several strategies one after the other; see Job.

Started as ``python -m tests.training.refusal_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.training.rank_jobs import RankJob, make_cpu_trainer, read_job

BAD_STEP = 2
NUM_STEPS = 5


@dataclass(frozen=True)
class Job(RankJob):
    """What to train and where to leave what was found.

    Attributes:
        folder: gets a folder for each case, and ``found.json``.
        data_root: holds the shards and ``manifests``.
        spec: arguments of ``ModelSpec``.
        cases: strategy, precision and what the guard does, of each training.
    """

    folder: str
    data_root: str
    spec: dict[str, Any]
    cases: list[list[str]]


def main(path: str) -> None:
    job = Job(**read_job(path))
    found = {"-".join(case): _train(job, *case) for case in job.cases}
    rank = os.environ.get("RANK", "0")
    (Path(job.folder) / f"found{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _train(job: Job, strategy: str, precision: str, action: str) -> dict[str, Any]:
    from tests.training.strategies_job import Case, make_strategy
    from tests.training.toy_training import overflow_backwards
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.conversation import ConversationEncoder
    from vipllava.models.building import ModelSpec, image_seq_length, token_id
    from vipllava.models.towers import CLIP
    from vipllava.stream.datamodule import VisualPromptDataModule
    from vipllava.stream.image_transform import ImageTransform
    from vipllava.training.csv_log import CsvLog
    from vipllava.training.guard import LossGuard
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings
    from vipllava.types import VipLlavaError
    from vipllava.visual_prompts.policies import VisualPromptPolicy

    keys: list[list[str]] = []
    weights: list[list[float]] = []

    class Noting(VipLlavaLitModule):
        def configure_model(self) -> None:
            begins = self.model is None
            super().configure_model()
            if begins:
                overflow_backwards(self, at_step=BAD_STEP)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            keys.append(list(batch.keys))
            # ZeRO-3 holds a part of each weight on this process.
            projector = self.network.model.multi_modal_projector
            held = [getattr(p, "ds_tensor", p) for p in projector.parameters()]
            weights.append([float(p.detach().float().sum()) for p in held])

    made, dtype = make_strategy(strategy, Case([], 1, 1.0, precision=precision))
    spec = ModelSpec(**{**job.spec, "dtype": dtype})
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        "llava_v1",
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=image_seq_length(spec),
        max_length=512,
    )
    root = Path(job.data_root)
    data = VisualPromptDataModule(
        "toy",
        root / "manifests",
        root,
        {"regions": VisualPromptPolicy()},
        encoder,
        ImageTransform(spec.image_size, "pad", CLIP.preprocessing),
        micro_batch_size=2,
        global_batch_size=4,
        num_workers=0,
    )
    folder = Path(job.folder) / f"{strategy}-{action}"
    guard = LossGuard(folder / "guard", on_nonfinite=action)
    module = Noting(
        spec,
        ["projector", "language_model"],
        OptimizerSettings(1e-2, warmup_ratio=0.0),
        seed=3,
        tokenizer=tokenizer,
        guard=guard,
    )
    log = CsvLog(folder / "csv")
    trainer = make_cpu_trainer(
        folder,
        devices=2,
        strategy=made,
        precision=precision,
        gradient_clip_val=1.0,
        max_steps=NUM_STEPS,
        logger=log,
    )
    message = None
    try:
        trainer.fit(module, datamodule=data)
    except VipLlavaError as error:
        message = str(error)
    log.save()
    return {
        "message": message,
        "keys": keys,
        "weights": weights,
        "steps": trainer.global_step,
        "num_skipped": guard.num_skipped,
    }


if __name__ == "__main__":
    main(sys.argv[1])
