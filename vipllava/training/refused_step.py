"""A refused step computed again: each micro-batch as it was, then each sample alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.checkpoints.training_state import read_training_state
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.models.tensor_files import read_tensor
from vipllava.stream.step_again import ReplayedMicroBatch
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.types import CheckpointError

if TYPE_CHECKING:
    from vipllava.types import Batch


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """What one sample of a replayed step says."""

    rank: int  # the process that had it
    micro_batch: int  # in which of its micro-batches
    key: str  # ``dataset/key``
    num_tokens: int  # of the sample, its image's among them
    num_supervised: int  # of them that carry loss
    loss: float  # mean over these, of the sample alone


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A replayed step."""

    loss: float  # of the global batch, by its micro-batches as they were
    samples: tuple[SampleLoss, ...]  # worst first: those whose loss is no number, then by loss


def load_weights(module: VipLlavaLitModule, checkpoint: Path) -> None:
    """Put a training checkpoint's weights into a module that is built.

    Args:
        module: built by its ``configure_model``; what the checkpoint leaves out stays.
        checkpoint: a file, or the folder of a sharded one.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    network = module.network
    if checkpoint.is_file():
        loaded = load_plain(checkpoint, mapped=True)
        unexpected = module.load_state_dict(loaded["state_dict"], strict=False).unexpected_keys
    else:
        tensors = {n: read_tensor(lazy) for n, lazy in read_training_state(checkpoint).items()}
        unexpected = network.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise CheckpointError(
            f"{checkpoint} is of another model: it has {', '.join(unexpected[:5])}; pass the "
            "overrides that the run had"
        )


def replay_losses(
    module: VipLlavaLitModule,
    micro_batches: Sequence[ReplayedMicroBatch],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> ReplayedStep:
    """Compute the losses of a step again; no gradients, dropout off.

    Args:
        module: built, with the weights to use.
        micro_batches: of all ranks.
        device: to compute on; the module is moved there.
        autocast: dtype of matrix products where weights are held in more.
    """
    network: Any = module.network
    network = network.to(device).eval()

    def loss_sum(batch: Batch) -> tuple[float, int]:
        context = torch.autocast(device.type, autocast) if autocast else nullcontext()
        with torch.no_grad(), context:
            total, count = supervised_loss_sum(network, batch.to(device))
        return float(total), count

    total, count, samples = 0.0, 0, []
    for micro_batch in micro_batches:
        part, terms = loss_sum(micro_batch.batch)
        total, count = total + part, count + terms
        for batch in micro_batch.single_samples:
            summed, supervised = loss_sum(batch)
            samples.append(
                SampleLoss(
                    rank=micro_batch.rank,
                    micro_batch=micro_batch.number,
                    key=batch.keys[0],
                    num_tokens=batch.input_ids.numel(),
                    num_supervised=supervised,
                    loss=summed / max(1, supervised),
                )
            )
    worst_first = sorted(samples, key=lambda s: (math.isfinite(s.loss), -s.loss))
    return ReplayedStep(total / max(1, count), tuple(worst_first))


def write_losses(step: ReplayedStep, path: Path) -> None:
    """Write a row for each sample, worst first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(SampleLoss)])
        rows.writeheader()
        rows.writerows(asdict(sample) for sample in step.samples)
