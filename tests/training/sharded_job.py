"""A few steps of the toy training under one strategy, in one process of several; see Job.

Started as ``python sharded_job.py JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to train and where to leave it.

    Attributes:
        folder: gets ``export``, ``losses.json``, ``samples`` and ``checkpoints``.
        strategy: ``one``, ``ddp``, ``zero2``, ``zero3`` or ``fsdp2``.
        spec: arguments of ``ModelSpec``.
        trainable: the parts that train.
        adapter: arguments of ``AdapterSettings``.
        num_samples: in micro-batches of 2.
        save: write a checkpoint at the last step.
    """

    folder: str
    strategy: str
    spec: dict[str, Any]
    trainable: list[str]
    adapter: dict[str, Any] | None = None
    num_samples: int = 16
    save: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    job = Job(**json.loads(Path(path).read_text()))
    import lightning
    import torch

    from tests.training.toy_training import Loader, make_samples
    from vipllava.checkpoints.export_meta import ExportMeta
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.models.adapters import AdapterSettings
    from vipllava.models.building import ModelSpec
    from vipllava.training.callbacks import ExportCallback
    from vipllava.training.checkpointing import CheckpointCallback
    from vipllava.training.ending import RunEnd
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.metrics import Throughput
    from vipllava.training.samples import SampleTable

    torch.set_num_threads(1)

    class RankLoader(Loader):
        def __len__(self) -> int:
            return super().__len__() // 2

        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                if index % 2 == torch.distributed.get_rank():
                    yield batch

    losses: dict[int, float] = {}

    class Noting(VipLlavaLitModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            loss = self.trainer.callback_metrics.get("train/loss")
            if loss is not None:
                losses[self._last_global_step] = float(loss)

    spec = ModelSpec(**job.spec)
    tokenizer = load_tokenizer(spec)
    adapter = AdapterSettings(**job.adapter) if job.adapter else None
    module = Noting(spec, job.trainable, 1e-3, seed=3, tokenizer=tokenizer, adapter=adapter)
    meta = ExportMeta(
        stage="finetune",
        chat_template="llava_v1",
        image_aspect="pad",
        image_size=28,
        image_seq_length=4,
        feature_layers=spec.feature_layers,
        vision_tower="tower",
        language_model="language",
    )
    folder = Path(job.folder)
    one = job.strategy == "one"
    # Samples 2, 3 and 6, 7 are text only: all that the second process ever gets.
    samples = make_samples(job.num_samples, text_only=lambda i: i % 4 >= 2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if one else 2,
        strategy="auto" if one else _strategy(job.strategy),
        accumulate_grad_batches=2 if one else 1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=job.save,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            ExportCallback(folder / "export", tokenizer, meta, base="base"),
            Throughput(every_n_steps=1),
            SampleTable(folder, every_n_steps=2, num_samples=2, tokenizer=tokenizer),
            *([RunEnd(), CheckpointCallback(folder / "checkpoints")] if job.save else []),
        ],
        default_root_dir=folder,
    )
    trainer.fit(module, Loader(samples, 2, 2) if one else RankLoader(samples, 2, 2))
    if trainer.is_global_zero:
        (folder / "losses.json").write_text(json.dumps(list(losses.values())))
    if not one:
        torch.distributed.destroy_process_group()


def _strategy(name: str) -> Any:
    if name == "fsdp2":
        from vipllava.training.sharding import Fsdp2Strategy

        return Fsdp2Strategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            process_group_backend="gloo",
        )
    if name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend="gloo")
    from tests.training.cpu_deepspeed import CpuDeepSpeedStrategy

    stage = {"zero2": 2, "zero3": 3}[name]
    return CpuDeepSpeedStrategy(
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
            },
        },
        process_group_backend="gloo",
    )


if __name__ == "__main__":
    main(sys.argv[1])
