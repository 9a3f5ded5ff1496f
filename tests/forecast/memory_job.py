"""Two steps of the toy training on one of two processes; leaves what the process holds, in bytes.

Started as ``python -m tests.forecast.memory_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    job = json.loads(Path(path).read_text())
    import lightning
    import torch

    from tests.training.sharded_job import _strategy
    from tests.training.toy_training import Loader, make_samples
    from vipllava.models.adapters import AdapterSettings
    from vipllava.models.building import ModelSpec
    from vipllava.training.lit_module import VipLlavaLitModule

    torch.set_num_threads(1)

    class RankLoader(Loader):
        def __len__(self) -> int:
            return super().__len__() // 2

        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                if index % 2 == torch.distributed.get_rank():
                    yield batch

    held: dict[str, int] = {}

    class Measuring(VipLlavaLitModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            held.update(_held(self.network, self.trainer))

    adapter = AdapterSettings(**job["adapter"]) if job["adapter"] else None
    module = Measuring(ModelSpec(**job["spec"]), job["trainable"], 1e-3, seed=3, adapter=adapter)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=_strategy(job["strategy"]),
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=job["folder"],
    )
    trainer.fit(module, RankLoader(make_samples(8), 2, 2))
    rank = torch.distributed.get_rank()
    Path(job["folder"], f"rank{rank}.json").write_text(json.dumps(held))


def _held(network: Any, trainer: Any) -> dict[str, int]:
    """Return the bytes of weights, and of what the optimizer keeps."""
    import torch

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
