"""What a training job will need and take, from plain values: memory, disk, steps, hours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from vipllava.forecast.architecture import Architecture
from vipllava.forecast.flops import device_peak, useful_flops
from vipllava.forecast.memory import (
    DeviceMemory,
    HostMemory,
    Setup,
    device_memory,
    host_memory,
    parameter_rows,
    weight_counts,
)
from vipllava.models.freezing import ParameterRow

MFU: Final = 0.4  # share of the peak expected unless told otherwise; see docs/machines.md
_USABLE: Final = 0.985  # a device "of 80 GB" tells of 79.2 GiB, one of 24 of 23.7
_MARGIN: Final = 0.1  # left free where memory is used to recompute less: it is no measurement
_HEADROOM: Final = 0.05  # left free by what is recommended; below it a job may run, or not


@dataclass(frozen=True, slots=True)
class DataSetShare:
    """One data set of a mix."""

    name: str  # the manifest's
    num_samples: int  # in it; 0 if that is not known
    num_per_epoch: int  # that an epoch takes of it


@dataclass(frozen=True, slots=True)
class Corpus:
    """An epoch of training data in numbers."""

    datasets: tuple[DataSetShare, ...]  # what it is mixed from
    mean_tokens: float  # of a sample, its image's placeholders among them
    mean_squared_tokens: float  # mean of the squares of the samples' lengths
    images_per_sample: float  # images of a sample, on average
    longest: int  # tokens of the longest sample
    supervised_share: float  # of a dense sample's tokens, those that carry loss; memory goes by it
    mean_supervised: float  # positions of a sample that carry loss, on average; work goes by it

    @property
    def num_samples(self) -> int:
        """Samples of an epoch; 0 if the size of a data set is not known."""
        known = all(part.num_samples for part in self.datasets)
        return sum(part.num_per_epoch for part in self.datasets) if known else 0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How often and how fast the corpus is gone through."""

    epochs: int  # passes
    global_rows: int  # rows of an optimizer step over all devices: samples, or packs
    samples_per_row: float = 1.0  # 1, or about how many samples share a pack
    mfu: float = MFU  # share of the devices' peak that useful work will make
    device: str | None = None  # name of one device, or None where it is not known
    num_checkpoints: int = 1  # that are kept; a new one is whole before an old one goes
    num_nodes: int = 1  # that share the processes equally
    num_workers: int = 0  # loader processes of each process
    on_devices: bool = True  # else it is the host that trains


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job will need and take."""

    parameters: tuple[ParameterRow, ...]  # of each part, and those that train
    memory: DeviceMemory  # of one device, bytes
    host: HostMemory  # of a node beside its devices, bytes
    checkpoint_bytes: float  # of one training checkpoint
    export_bytes: float  # of what stands at the end: the model, adapters or the projector beside it
    disk_bytes: float  # checkpoints and export together, with the one being written
    num_steps: int | None  # optimizer steps; None where the size of the data is not known
    samples_per_step: float  # of a whole global batch
    tokens_per_step: float  # on average, padding left out
    flops_per_step: float  # useful ones, see :mod:`vipllava.forecast.flops`
    hours: float | None  # of training; None where size or the device's peak is not known
    times_seen: Mapping[str, float]  # how often each data set's samples are seen in the whole run


@dataclass(frozen=True, slots=True)
class Choice:
    """What fits a device."""

    strategy: str  # the one that takes least off a device, see :func:`choose_strategy`
    micro_batch_size: int  # the largest that fits
    memory: DeviceMemory  # at the micro-batch that was wanted, or the largest if that is smaller


def forecast(architecture: Architecture, setup: Setup, corpus: Corpus, plan: RunPlan) -> Forecast:
    """Say what a job will need and take."""
    samples = plan.global_rows * plan.samples_per_row
    flops = useful_flops(
        architecture,
        setup.workload,
        num_samples=samples,
        num_tokens=samples * corpus.mean_tokens,
        num_supervised=samples * corpus.mean_supervised,
        num_images=samples * corpus.images_per_sample,
        squared_tokens=samples * corpus.mean_squared_tokens,
        adapter_rank=setup.adapter_rank,
        tower_trains="vision_tower" in setup.trainable,
    )
    num_steps = hours = None
    if corpus.num_samples:
        num_steps = plan.epochs * math.ceil(corpus.num_samples / samples)
        peak = device_peak(plan.device) if plan.device else None
        if peak is not None:
            whole = flops * plan.epochs * corpus.num_samples / samples
            hours = whole / (plan.mfu * peak * setup.num_devices) / 3600
    checkpoint, export = (size(architecture, setup) for size in (checkpoint_bytes, export_bytes))
    return Forecast(
        parameters=parameter_rows(architecture, setup),
        memory=device_memory(architecture, setup),
        host=host_memory(
            architecture,
            setup,
            num_nodes=plan.num_nodes,
            num_workers=plan.num_workers,
            on_devices=plan.on_devices,
        ),
        checkpoint_bytes=checkpoint,
        export_bytes=export,
        disk_bytes=(plan.num_checkpoints + 1) * checkpoint + export,
        num_steps=num_steps,
        samples_per_step=samples,
        tokens_per_step=samples * corpus.mean_tokens,
        flops_per_step=flops,
        hours=hours,
        times_seen={
            part.name: plan.epochs * part.num_per_epoch / part.num_samples
            for part in corpus.datasets
            if part.num_samples
        },
    )


def checkpoint_bytes(architecture: Architecture, setup: Setup) -> float:
    """Return the size of a training checkpoint: what trains, as it is updated, and Adam's state."""
    _, trained = weight_counts(architecture, setup)
    # DeepSpeed updates float32 masters.
    return float(trained * 3 * (4 if setup.is_zero else setup.weight_bytes))


def export_bytes(architecture: Architecture, setup: Setup) -> float:
    """Return the size of what a finished run leaves: the whole model, and what was trained."""
    count, _ = weight_counts(architecture, setup)
    if setup.rank or setup.trainable == ("projector",):
        count += architecture.projector_parameters
    return float(setup.weight_bytes * count)


def device_capacity(memory_gb: float) -> float:
    """Return the bytes that a device of ``memory_gb`` (as its maker names it) really has."""
    return memory_gb * _USABLE * 2**30


def fits(memory: DeviceMemory, capacity: float) -> bool:
    """Return whether a step fits a device of ``capacity`` bytes with some room left."""
    return memory.total * (1 + _HEADROOM) <= capacity


def micro_batches(global_rows: int, num_devices: int) -> list[int]:
    """Return the micro-batches that divide the global batch on so many devices, ascending."""
    per_device, rest = divmod(global_rows, num_devices)
    return [] if rest else [m for m in range(1, per_device + 1) if per_device % m == 0]


def largest_micro_batch(
    architecture: Architecture, setup: Setup, capacity: float, global_rows: int
) -> int | None:
    """Return the largest micro-batch that divides the global batch and :func:`fits`, or None."""
    for size in reversed(micro_batches(global_rows, setup.num_devices)):
        if fits(device_memory(architecture, replace(setup, micro_batch_size=size)), capacity):
            return size
    return None


def fewest_recomputed(architecture: Architecture, setup: Setup, capacity: float) -> int:
    """Return how many decoder blocks have to be recomputed for a step to fit, with a margin.

    All of them, where nothing fits; what the setup itself recomputes does not matter.
    """
    num_blocks = architecture.language_model.num_blocks
    for count in range(num_blocks):
        tried = device_memory(architecture, replace(setup, recomputed_blocks=count))
        if tried.total * (1 + _MARGIN) <= capacity:
            return count
    return num_blocks


def possible_strategies(setup: Setup) -> tuple[str, ...]:
    """Return the strategies that could take a setup's place, the least sharded first.

    The one it has among them. Replicas (DDP) hold float32 weights and make half-precision copies:
    on several devices ZeRO-2 does with less, so DDP is for what DeepSpeed cannot do.
    """
    if setup.num_devices == 1:
        return ("single",)
    if setup.workload == "qlora" or setup.precision.startswith("32"):
        return ("ddp",)
    # FSDP2 has no loss scaling and is never chosen, only taken.
    known = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
    return tuple(s for s in known if s == setup.strategy or s.startswith("zero"))


def choose_strategy(
    architecture: Architecture, setup: Setup, capacity: float, global_rows: int
) -> Choice | None:
    """Choose the least sharded strategy that fits the setup's micro-batch.

    Where none does, the one that fits the largest micro-batch; offloading, which is slow, only
    where nothing else fits at all; None where nothing fits. The setup's own is among those tried.
    """
    best: Choice | None = None
    for strategy in possible_strategies(setup):
        if best is not None and strategy.endswith("offload"):
            break
        tried = replace(setup, strategy=strategy)
        largest = largest_micro_batch(architecture, tried, capacity, global_rows)
        if largest is None or (best is not None and largest <= best.micro_batch_size):
            continue
        wanted = min(setup.micro_batch_size, largest)
        memory = device_memory(architecture, replace(tried, micro_batch_size=wanted))
        best = Choice(strategy, largest, memory)
        if largest >= setup.micro_batch_size:
            break
    return best
