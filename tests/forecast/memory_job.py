"""Two steps of the toy training on one of two processes; leaves what the process holds, in bytes.

Started as ``python -m tests.forecast.memory_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.rank_jobs import RankLoader, make_cpu_trainer, read_job


def main(path: str) -> None:
    job = read_job(path)
    from tests.training.sharded_job import make_sharded_strategy
    from tests.training.toy_training import make_samples
    from vipllava.models.adapters import AdapterSettings
    from vipllava.models.building import ModelSpec
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings

    held: dict[str, int] = {}

    class Measuring(VipLlavaLitModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            held.update(_held(self.network, self.trainer))

    adapter = AdapterSettings(**job["adapter"]) if job["adapter"] else None
    module = Measuring(
        ModelSpec(**job["spec"]), job["trainable"], OptimizerSettings(1e-3), seed=3, adapter=adapter
    )
    trainer = make_cpu_trainer(
        job["folder"],
        devices=2,
        strategy=make_sharded_strategy(job["strategy"]),
        precision="bf16-mixed",
        max_epochs=1,
    )
    trainer.fit(module, RankLoader(make_samples(8), 2, 2))
    rank = torch.distributed.get_rank()
    Path(job["folder"], f"rank{rank}.json").write_text(json.dumps(held))


def _held(network: Any, trainer: Any) -> dict[str, int]:
    """Return the bytes of weights, and of what the optimizer keeps."""

    def size(tensors: Any) -> int:
        local = [getattr(t, "_local_tensor", t) for t in tensors]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in local}
        return sum(storage.nbytes() for storage in storages.values())

    # ZeRO-3 leaves an empty tensor in the network and keeps its part beside it.
    weights = [getattr(p, "ds_tensor", p) for p in network.parameters()]
    (optimizer,) = trainer.optimizers
    inner = getattr(optimizer, "optimizer", optimizer)
    state = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t)]
    masters = [
        *getattr(optimizer, "single_partition_of_fp32_groups", []),  # ZeRO-2
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),  # ZeRO-3
    ]
    gradients: list[Any] = [p.grad for p in network.parameters() if p.grad is not None]
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        gradients = [optimizer.grad_partitions_flat_buffer]
    return {
        "weights": size(weights),
        "optimizer": size(state) + size(masters),
        "gradients": size(gradients),
    }


if __name__ == "__main__":
    main(sys.argv[1])
