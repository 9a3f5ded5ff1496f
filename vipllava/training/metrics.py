"""What a run logs, by name, and the callback that measures how fast it goes.

These names are the same in every logger; ``docs/logging.md`` explains them. What belongs to one
optimizer step is logged by the module; what needs a stretch of time, or a sum over ranks that no
step can spare, is measured here over a window of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from vipllava.forecast.architecture import Architecture, architecture_of
from vipllava.forecast.flops import Workload, device_peak, useful_flops
from vipllava.models.supervised_loss import supervised_positions
from vipllava.stream.loader import StepLoader
from vipllava.stream.ranks import gather_objects
from vipllava.training.dataset_losses import DatasetLosses
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.types import PADDING_SEGMENT, Batch

LOSS: Final = "train/loss"
LEARNING_RATE: Final = "train/lr"
GRADIENT_NORM: Final = "train/grad_norm"
SUPERVISED_TOKENS: Final = "train/supervised_tokens"
SAMPLES_PER_SECOND: Final = "train/samples_per_second"
SUPERVISED_TOKENS_PER_SECOND: Final = "train/supervised_tokens_per_second"
TOKENS_PER_SECOND: Final = "train/tokens_per_second"
MFU: Final = "train/mfu"
MEMORY: Final = "train/memory_gb"
WAIT_SHARE: Final = "data/wait_share"
QUARANTINED: Final = "data/quarantined_total"
VALIDATION_LOSS: Final = "val/loss"
SAMPLES: Final = "samples"

METRICS: Final[Mapping[str, str]] = {
    LOSS: "cross entropy per supervised token of the step's global batch",
    LEARNING_RATE: "the highest of the parameter groups' rates in this step",
    GRADIENT_NORM: "norm of the whole gradient before clipping",
    SUPERVISED_TOKENS: "supervised tokens of the step's global batch",
    SAMPLES_PER_SECOND: "samples, all ranks together",
    SUPERVISED_TOKENS_PER_SECOND: "tokens that carry loss, all ranks together",
    TOKENS_PER_SECOND: "tokens with those of images, without padding, all ranks together",
    MFU: "useful FLOP/s over the devices' peak; recomputation and padding never count",
    MEMORY: "most memory allocated on any device since the start, 10^9 bytes; CUDA only",
    WAIT_SHARE: "share of the time that the rank which waited longest waited for data, 0..1",
    QUARANTINED: "bad samples replaced since the start, all ranks together",
    VALIDATION_LOSS: "cross entropy per supervised token of the validation data",
}
"""Every metric and its meaning. Beside them there are :func:`dataset_loss` for each data set and,
where parts differ, their rates (:func:`vipllava.training.optim.learning_rates`)."""


def dataset_loss(name: str) -> str:
    """Return the metric of one data set's loss: the mean over a window's supervised tokens."""
    return f"{LOSS}/{name}"


def segment_lengths(batch: Batch) -> torch.Tensor:
    """Return at the last position of every sample its length, and 0 elsewhere.

    A shape that does not depend on the values: on a device nothing has to wait for it.

    Args:
        batch: padded or packed rows; padding may lie anywhere.

    Returns:
        int64 [rows, length].
    """
    real = batch.segment_ids != PADDING_SEGMENT
    ends = batch.position_ids.roll(-1, 1) == 0
    ends[:, -1] = True
    return (batch.position_ids + 1) * (real & ends)


@dataclass(frozen=True, slots=True)
class BatchFlops:
    """Counts the useful operations of a micro-batch by its samples' lengths and supervision."""

    architecture: Architecture  # the network's sizes
    workload: Workload  # what trains of the language model
    adapter_rank: int = 0  # of LoRA, or 0
    tower_trains: bool = False  # the tower gets gradients, too

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the FLOPs of a micro-batch, float64 and on its device: no step waits for it.

        See :func:`vipllava.forecast.flops.useful_flops`.
        """
        lengths = segment_lengths(batch).double()
        num_tokens: Any = lengths.sum()
        squared_tokens: Any = lengths.square().sum()
        num_supervised: Any = supervised_positions(batch).sum()
        flops: Any = useful_flops(
            self.architecture,
            self.workload,
            num_samples=len(batch.keys),
            num_tokens=num_tokens,
            num_supervised=num_supervised,
            num_images=len(batch.pixel_values),
            squared_tokens=squared_tokens,
            adapter_rank=self.adapter_rank,
            tower_trains=self.tower_trains,
        )
        return flops


def count_flops_of(module: VipLlavaLitModule) -> BatchFlops:
    """Return what counts the operations of a module's micro-batches.

    Args:
        module: its network is built.
    """
    adapter = module.adapter
    workload: Workload = "full"
    if "language_model" not in module.trainable:
        workload = "projector"
    elif adapter is not None:
        workload = "lora" if module.quantization is None else "qlora"
    return BatchFlops(
        architecture_of(module.network.config),
        workload,
        adapter_rank=0 if adapter is None else adapter.r,
        tower_trains="vision_tower" in module.trainable,
    )


@dataclass(slots=True)
class _Window:
    """What one rank adds up between two logs; ``waited`` is the loader's clock at its start."""

    began: float
    waited: float
    num_steps: int = 0
    num_samples: int = 0
    num_supervised: int = 0
    num_tokens: int | torch.Tensor = 0
    useful_flops: float | torch.Tensor = 0.0
    idle: float = 0.0


@dataclass(frozen=True, slots=True)
class WindowSums:
    """What one rank did in a window of optimizer steps."""

    seconds: float  # how long it took, validation left out
    seconds_waited: float | None  # for data; None where the loader does not say
    num_samples: int  # of this rank
    num_supervised: int  # supervised tokens of the global batches: all ranks together
    num_tokens: int  # of this rank, without padding
    useful_flops: float | None = None  # of this rank; None where nothing counts them
    # Most bytes allocated on its device; None where the device does not say.
    memory: int | None = None
    # By data set the summed loss and the number of its tokens, of this rank.
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def window_metrics(ranks: list[WindowSums], peak_flops: float | None = None) -> dict[str, float]:
    """Return the metrics of a window from what every rank did in it.

    Args:
        ranks: one for each rank.
        peak_flops: of one device, FLOP/s.
    """
    seconds = max(rank.seconds for rank in ranks)
    metrics: dict[str, float] = {}
    if seconds > 0:
        metrics[SAMPLES_PER_SECOND] = sum(rank.num_samples for rank in ranks) / seconds
        metrics[SUPERVISED_TOKENS_PER_SECOND] = ranks[0].num_supervised / seconds
        metrics[TOKENS_PER_SECOND] = sum(rank.num_tokens for rank in ranks) / seconds
        waits = [rank.seconds_waited for rank in ranks if rank.seconds_waited is not None]
        if waits:
            metrics[WAIT_SHARE] = max(waits) / seconds
        flops = [rank.useful_flops for rank in ranks if rank.useful_flops is not None]
        if flops and peak_flops:
            metrics[MFU] = sum(flops) / seconds / (peak_flops * len(ranks))
    memory = [rank.memory for rank in ranks if rank.memory is not None]
    if memory:
        metrics[MEMORY] = max(memory) / 1e9
    for name in sorted({name for rank in ranks for name in rank.losses}):
        pairs = [rank.losses[name] for rank in ranks if name in rank.losses]
        total, count = (sum(values) for values in zip(*pairs, strict=True))
        if count:
            metrics[dataset_loss(name)] = total / count
    return metrics


class Throughput(Callback):
    """Measures speed, waiting, memory and the loss of each data set over windows of steps.

    The ranks meet once a window, not every step. A window ends every so many optimizer steps of the
    run, and with the training; time spent in validation is left out. The first one has the start-up
    in it.

    Args:
        every_n_steps: optimizer steps of a window.
        useful_flops: FLOPs of a micro-batch that count as useful; those of the module by default.
        peak_flops: of one device, FLOP/s; that of the device's published peak by default. Where it
            is not known no MFU is logged.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        useful_flops: Callable[[Batch], float | torch.Tensor] | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.useful_flops = useful_flops
        self.peak_flops = peak_flops
        self._clock = clock
        self._losses = DatasetLosses()
        self._window = _Window(0.0, 0.0)
        self._paused_at = 0.0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first window."""
        if isinstance(pl_module, VipLlavaLitModule):
            if self._losses not in pl_module.observers:
                pl_module.observers.append(self._losses)
            if self.peak_flops is None:
                self.peak_flops = peak_of(pl_module.device)
            if self.useful_flops is None and self.peak_flops is not None:
                self.useful_flops = count_flops_of(pl_module)
        self._last_step = trainer.global_step
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = self._clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._window.idle += self._clock() - self._paused_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch; log if it ends a window."""
        window = self._window
        window.num_samples += len(batch.counted_keys)
        # Added up on the device, and read at the window's end: no step waits for it.
        window.num_tokens += (batch.segment_ids != PADDING_SEGMENT).sum()
        if self.useful_flops is not None:
            window.useful_flops += self.useful_flops(batch)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        window.num_steps += 1
        window.num_supervised += batch.num_supervised_global
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left."""
        if self._window.num_steps:
            self._log(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._window = _Window(self._clock(), _seconds_waited(trainer) or 0.0)

    def _log(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what is queued belongs to this window
        window, waited = self._window, _seconds_waited(trainer)
        mine = WindowSums(
            seconds=self._clock() - window.began - window.idle,
            seconds_waited=None if waited is None else waited - window.waited,
            num_samples=window.num_samples,
            num_supervised=window.num_supervised,
            num_tokens=int(window.num_tokens),
            useful_flops=None if self.useful_flops is None else float(window.useful_flops),
            memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            losses=self._losses.take(),
        )
        metrics = window_metrics(gather_objects(mine), self.peak_flops)
        loader = trainer.train_dataloader
        if isinstance(loader, StepLoader):
            metrics[QUARANTINED] = float(loader.quarantine_log.total)
        for logger in trainer.loggers:
            # Not by the module's `log`, which repeats a value in every step until the next one.
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        self._begin(trainer)


def peak_of(device: torch.device) -> float | None:
    """Return the published peak of a device, FLOP/s; None where it is not known."""
    return device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _seconds_waited(trainer: Trainer) -> float | None:
    loader = trainer.train_dataloader
    return loader.seconds_waited if isinstance(loader, StepLoader) else None
