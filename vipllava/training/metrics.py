"""What a run logs, by name, see ``docs/logging.md``; and the callback that measures its speed.

What belongs to one optimizer step is logged by the module, what needs a stretch of time here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from torch.nn import functional

from vipllava.forecast.architecture import Architecture, architecture_of
from vipllava.forecast.flops import Workload, device_peak, useful_flops
from vipllava.models.supervised_loss import Predictions, supervised_positions
from vipllava.stream.loader import StepLoader
from vipllava.stream.ranks import gather_objects
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.progress import TrainingClock
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
TRUNCATED: Final = "data/truncated_total"
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
    TRUNCATED: "samples shortened to the length limit since the start, all ranks together",
    VALIDATION_LOSS: "cross entropy per supervised token of the validation data",
}
"""Every metric and its meaning. Beside them there are :func:`dataset_loss` for each data set and,
where parts differ, their rates (:func:`vipllava.training.optim.learning_rates`)."""

_ROWS = 256
"""Logits looked at together: 0.13 GB of a vocabulary of 128,000 in float32."""


def dataset_loss(name: str) -> str:
    """Return the metric of one data set's loss: the mean over a window's supervised tokens."""
    return f"{LOSS}/{name}"


def segment_lengths(batch: Batch) -> torch.Tensor:
    """Return at the last position of every sample its length, else 0: int64 [rows, length]."""
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
        """Return the FLOPs of a micro-batch, float64 and on its device: no step waits for it."""
        lengths = segment_lengths(batch).double()
        counts: dict[str, Any] = {
            "num_samples": len(batch.keys),
            "num_tokens": lengths.sum(),
            "num_supervised": supervised_positions(batch).sum(),
            "num_images": len(batch.pixel_values),
            "squared_tokens": lengths.square().sum(),
            "adapter_rank": self.adapter_rank,
            "tower_trains": self.tower_trains,
        }
        flops: Any = useful_flops(self.architecture, self.workload, **counts)
        return flops


def count_flops_of(module: VipLlavaLitModule) -> BatchFlops:
    """Return what counts the operations of a module's micro-batches; its network is built."""
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


class DatasetLosses:
    """Adds up losses and supervised tokens by data set on this rank; an observer of predictions.

    In a micro-batch of several, tokens' losses are worked out again without a graph, some rows of
    logits at a time, for memory's sake. Nothing waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Add a micro-batch; one without names of data sets is passed over."""
        known = list(dict.fromkeys(batch.datasets))
        total = predictions.loss_sum
        if len(known) < 2:
            count = torch.full_like(total, len(predictions.targets))
            sums = torch.stack([total, count])[None]
        else:
            device = predictions.logits.device
            numbers = torch.tensor([known.index(name) for name in batch.datasets]).to(device)
            sample = sample_of_position(batch.segment_ids)[:, 1:][predictions.supervised]
            sums = torch.zeros(len(known), 2, device=device)
            columns = (predictions.logits, predictions.targets, numbers[sample])
            parts = (column.split(_ROWS) for column in columns)
            for logits, targets, dataset in zip(*parts, strict=True):
                losses = functional.cross_entropy(logits, targets, reduction="none")
                both = torch.stack([losses, torch.ones_like(losses)], dim=1)
                sums.index_add_(0, dataset, both)
        for name, values in zip(known, sums, strict=False):
            self._sums[name] = self._sums[name] + values if name in self._sums else values

    def take(self) -> dict[str, tuple[float, float]]:
        """Return by data set the summed loss and the number of tokens since the last call."""
        sums, self._sums = self._sums, {}
        return {name: (float(total), float(count)) for name, (total, count) in sums.items()}


def sample_of_position(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return which of a batch's samples, in the order of its keys, each position belongs to.

    ``segment_ids`` and the result, which means nothing on padding, are int64 [rows, length].
    """
    per_row = segment_ids.amax(dim=1) + 1
    first = per_row.cumsum(0) - per_row
    return segment_ids + first[:, None]


@dataclass(slots=True)
class WindowSums:
    """What one rank did in a window of optimizer steps."""

    seconds: float = 0.0  # how long it took, validation left out
    seconds_waited: float | None = None  # for data; None where the loader does not say
    num_samples: int = 0  # of this rank
    num_supervised: int = 0  # supervised tokens of the global batches: all ranks together
    num_tokens: int | torch.Tensor = 0  # of this rank, without padding
    useful_flops: float | torch.Tensor | None = None  # of this rank; None: nothing counts them
    memory: int | None = None  # most bytes allocated on its device, if the device says
    # By data set the summed loss and the number of its tokens, of this rank.
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def window_metrics(ranks: list[WindowSums], peak_flops: float | None = None) -> dict[str, float]:
    """Return the metrics of a window from what every rank did in it; the peak is one device's."""
    seconds = max(rank.seconds for rank in ranks)
    metrics: dict[str, float] = {}
    if seconds > 0:
        metrics[SAMPLES_PER_SECOND] = sum(rank.num_samples for rank in ranks) / seconds
        metrics[SUPERVISED_TOKENS_PER_SECOND] = ranks[0].num_supervised / seconds
        metrics[TOKENS_PER_SECOND] = sum(int(rank.num_tokens) for rank in ranks) / seconds
        if waits := [r.seconds_waited for r in ranks if r.seconds_waited is not None]:
            metrics[WAIT_SHARE] = max(waits) / seconds
        flops = [float(rank.useful_flops) for rank in ranks if rank.useful_flops is not None]
        if flops and peak_flops:
            metrics[MFU] = sum(flops) / seconds / (peak_flops * len(ranks))
    if memory := [rank.memory for rank in ranks if rank.memory is not None]:
        metrics[MEMORY] = max(memory) / 1e9
    for name in sorted({name for rank in ranks for name in rank.losses}):
        pairs = [rank.losses[name] for rank in ranks if name in rank.losses]
        if count := sum(tokens for _, tokens in pairs):
            metrics[dataset_loss(name)] = sum(loss for loss, _ in pairs) / count
    return metrics


@dataclass(eq=False)
class Throughput(TrainingClock):
    """Measures speed, waiting, memory and the loss of each data set over windows of steps.

    The ranks meet once a window. Validation's time is left out; the first window has the start-up.
    """

    every_n_steps: int = 10  # optimizer steps of a window
    # FLOPs of a micro-batch that count as useful; those of the module by default.
    useful_flops: Callable[[Batch], float | torch.Tensor] | None = None
    # Of one device, FLOP/s; its published one by default. Without it there is no MFU.
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        self._losses = DatasetLosses()
        self._window = WindowSums()
        self._num_steps = 0  # of this window
        self._waited_before = 0.0
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch; log if it ends a window."""
        window = self._window
        window.num_samples += len(batch.counted_keys)
        # Added up on the device, and read at the window's end: no step waits for it.
        window.num_tokens += (batch.segment_ids != PADDING_SEGMENT).sum()
        if self.useful_flops is not None:
            before = 0.0 if window.useful_flops is None else window.useful_flops
            window.useful_flops = before + self.useful_flops(batch)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._num_steps += 1
        window.num_supervised += batch.num_supervised_global
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left."""
        if self._num_steps:
            self._log(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._window, self._num_steps = WindowSums(), 0
        self._waited_before = getattr(trainer.train_dataloader, "seconds_waited", 0.0)
        self.restart_clock()

    def _log(self, trainer: Trainer) -> None:
        device, mine = trainer.strategy.root_device, self._window
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what is queued belongs to this window
            mine.memory = torch.cuda.max_memory_allocated(device)
        mine.seconds = self.seconds()
        loader = trainer.train_dataloader
        if isinstance(loader, StepLoader):
            mine.seconds_waited = loader.seconds_waited - self._waited_before
        mine.num_tokens = int(mine.num_tokens)
        mine.useful_flops = None if mine.useful_flops is None else float(mine.useful_flops)
        mine.losses = self._losses.take()
        metrics = window_metrics(gather_objects(mine), self.peak_flops)
        if isinstance(loader, StepLoader):
            metrics[QUARANTINED] = float(loader.quarantine_log.total)
            metrics[TRUNCATED] = float(loader.num_truncated)
        for logger in trainer.loggers:
            # Not by the module's `log`, which repeats a value in every step until the next one.
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        self._begin(trainer)


def peak_of(device: torch.device) -> float | None:
    """Return the published peak of a device, FLOP/s; None where it is not known."""
    return device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
