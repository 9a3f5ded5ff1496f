"""A few steps of the toy training under one strategy, in one process of several; see Job.

Started as ``python sharded_job.py JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from tests.tiny_model import META
from tests.training.rank_jobs import RankJob, RankLoader, make_cpu_trainer, read_job


@dataclass(frozen=True)
class Job(RankJob):
    """What to train and where to leave it.

    Attributes:
        folder: gets ``export``, ``losses.json``, ``samples`` and ``checkpoints``.
        strategy: ``one``, ``ddp``, ``zero2``, ``zero3`` or ``fsdp2``.
        spec: arguments of ``ModelSpec``.
        trainable: the parts that train.
        adapter: arguments of ``AdapterSettings``.
        num_samples: in micro-batches of 2.
        save: write a checkpoint at the last step.
        export_seconds: how long the first process's export takes, where a collective has a second.
        export_fails: for a disk that is full.
    """

    folder: str
    strategy: str
    spec: dict[str, Any]
    trainable: list[str]
    adapter: dict[str, Any] | None = None
    num_samples: int = 16
    save: bool = False
    export_seconds: float = 0.0
    export_fails: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def main(path: str) -> None:
    job = Job(**read_job(path))

    from tests.training.toy_training import Loader, make_samples
    from vipllava.checkpoints.loading import build_model, load_tokenizer
    from vipllava.models.adapters import AdapterSettings, add_adapters
    from vipllava.models.building import ModelSpec
    from vipllava.models.freezing import set_trainable
    from vipllava.training.callbacks import ExportCallback
    from vipllava.training.checkpointing import CheckpointCallback
    from vipllava.training.ending import RunEnd
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.metrics import Throughput
    from vipllava.training.optim import OptimizerSettings
    from vipllava.training.sample_log import SampleTable

    losses: dict[int, float] = {}
    one = job.strategy == "one"
    sharded = job.strategy in ("fsdp2", "zero3")
    rank = int(os.environ.get("RANK", "0"))
    spec = ModelSpec(**job.spec)
    tokenizer = load_tokenizer(spec)
    adapter = AdapterSettings(**job.adapter) if job.adapter else None
    seed = 3
    expected = build_model(spec, tokenizer, seed=seed)
    if adapter:
        add_adapters(expected, adapter, seed=seed)
    set_trainable(expected, job.trainable)
    if job.strategy == "zero3":
        _refuse_broadcast()

    class Noting(VipLlavaLitModule):
        def configure_model(self) -> None:
            super().configure_model()
            if job.strategy == "zero3":
                _check_parts(self.network, expected, rank)
                _check_groups(self.network, expected)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            loss = self.trainer.callback_metrics.get("train/loss")
            if loss is not None:
                losses[self._last_global_step] = float(loss)

    # Sharded, all weights are the first process's: what another one would draw must not matter.
    drawn = seed + rank if sharded else seed
    module = Noting(
        spec,
        job.trainable,
        OptimizerSettings(1e-3),
        seed=drawn,
        tokenizer=tokenizer,
        adapter=adapter,
    )
    folder = Path(job.folder)
    # Samples 2, 3 and 6, 7 are text only: all that the second process ever gets.
    samples = make_samples(job.num_samples, text_only=lambda i: i % 4 >= 2)
    trainer = make_cpu_trainer(
        folder,
        devices=1 if one else 2,
        strategy="auto" if one else make_sharded_strategy(job.strategy),
        accumulate_grad_batches=2 if one else 1,
        max_epochs=1,
        enable_checkpointing=job.save,
        callbacks=[
            *([_HardExport(job)] if job.export_seconds or job.export_fails else []),
            ExportCallback(folder / "export", tokenizer, META, base="base"),
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


def _refuse_broadcast() -> None:
    """Weights that are not the right ones before the engine starts must not become so by it."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    def refuse(self: DeepSpeedEngine) -> None:
        raise AssertionError("the engine broadcasts whole weights")

    DeepSpeedEngine._broadcast_model = refuse


def _check_parts(network: Any, expected: Any, rank: int) -> None:
    """Insist that this process holds its half of every weight, and nothing else, and the right one.

    Called before there is an engine.
    """
    import torch
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    found, wanted = dict(network.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, name
        assert parameter.numel() == 0, name
        whole = wanted[name].detach().flatten()
        assert parameter.ds_shape == wanted[name].shape, name
        half = -(-whole.numel() // 2)
        assert parameter.ds_tensor.numel() == half, name
        mine = whole[rank * half : (rank + 1) * half]
        assert torch.equal(parameter.ds_tensor[: len(mine)], mine), name
    for (name, buffer), (_, value) in zip(
        network.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, value), name


def _check_groups(network: Any, expected: Any) -> None:
    """Insist that what is counted and what decays is the same as of whole weights."""
    from vipllava.models.freezing import modules_of, parameter_table, whole_shape
    from vipllava.training.optim import OptimizerSettings, parameter_groups

    settings = OptimizerSettings(learning_rate=1.0, weight_decay=0.1)
    groups: list[Any] = [parameter_groups(modules_of(n), settings) for n in (network, expected)]
    found, wanted = (
        [(g["name"], [whole_shape(p) for p in g["params"]], g["weight_decay"]) for g in some]
        for some in groups
    )
    assert found == wanted
    assert parameter_table(network) == parameter_table(expected)


class _HardExport(Callback):
    """From the end of training on a collective may take a second, and the export is hard."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        from datetime import timedelta

        import torch

        from vipllava.training import callbacks

        torch.distributed.barrier()
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        save_export: Any = callbacks.save_export

        def save(*args: Any) -> Any:
            time.sleep(self.job.export_seconds)
            if self.job.export_fails:
                raise OSError(28, "No space left on device")
            return save_export(*args)

        callbacks.save_export = save


def make_sharded_strategy(name: str) -> Any:
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
