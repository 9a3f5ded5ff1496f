"""A refused step computed again: each micro-batch as it was, then each sample alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.checkpoints.training_state import read_training_state
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.models.tensor_files import read_tensor
from vipllava.stream.step_again import ReplayedMicroBatch
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.types import Batch, CheckpointError


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
    """Put the weights of a training checkpoint, a file or a folder, into a module that is built.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    if checkpoint.is_file():
        into, state = module, load_plain(checkpoint, mapped=True)["state_dict"]
    else:
        lazy = read_training_state(checkpoint)
        into, state = module.network, {name: read_tensor(value) for name, value in lazy.items()}
    unexpected = into.load_state_dict(state, strict=False).unexpected_keys
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
        module: built, with the weights to use; it is moved to the device.
        micro_batches: of all ranks.
        device: to compute on.
        autocast: dtype of matrix products where weights are held in more.
    """
    network: Any = module.network
    network = network.to(device).eval()

    def loss_sum(batch: Batch) -> tuple[float, int]:
        context = torch.autocast(device.type, autocast) if autocast else nullcontext()
        with torch.no_grad(), context:
            total, count = supervised_loss_sum(network, batch.to(device))
        return float(total), count

    total, count, samples = 0.0, 0, list[SampleLoss]()
    for part in micro_batches:
        summed, supervised = loss_sum(part.batch)
        total, count = total + summed, count + supervised
        for batch in part.single_samples:
            summed, supervised = loss_sum(batch)
            length, mean = batch.input_ids.numel(), summed / max(1, supervised)
            samples.append(
                SampleLoss(part.rank, part.number, batch.keys[0], length, supervised, mean)
            )
    worst_first = sorted(samples, key=lambda s: (math.isfinite(s.loss), -s.loss))
    return ReplayedStep(total / max(1, count), tuple(worst_first))


def write_losses(step: ReplayedStep, path: Path) -> None:
    """Write a row for each sample, worst first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(SampleLoss)])
        rows.writeheader()
        rows.writerows(asdict(sample) for sample in step.samples)
