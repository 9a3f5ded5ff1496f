"""What a job holds in the memory of a node, beside its devices: while it loads, trains and saves.

Weights are read from mapped files, whose pages the processes of a node share and the kernel may
take back: they are told, and not asked for. What a process keeps of its own is counted once for
each of them, and what only the job's first process does, on its node.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vipllava.forecast.architecture import Architecture
from vipllava.forecast.memory import Setup, device_memory, parameter_rows

COPIES: Final = {"fsdp2": (0.0, 1.0)}
"""Copies of all weights on the host while they are loaded, by strategy: of every process, and of
the first one alone. Where there are none, each weight goes from the mapped file to its device."""

_PROCESS_BYTES: Final = 700_000_000  # Python and torch
_CUDA_BYTES: Final = 1_300_000_000  # CUDA's and NCCL's share of the host, for each process
_WORKER_BYTES: Final = 300_000_000  # of a loader process, what it does not share
_STORED_BYTES: Final = 2  # of a weight in the files of published models


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of the node that needs most: the job's first one."""

    processes: float  # of all processes and their loader processes, with nothing of the network
    copies: float  # of weights, while they are loaded; gone when they are where they train
    # What stays on the host while a job trains: what is offloaded; without devices all.
    trained: float
    # Of a checkpoint that is written beside the training, or the whole network that is exported at
    # the end, whichever is larger.
    saving: float
    files: float  # pages of mapped weight files, which the kernel may take back

    @property
    def start(self) -> float:
        """What the node has to have while weights are loaded."""
        return self.processes + self.copies

    @property
    def total(self) -> float:
        """What the node has to have."""
        return max(self.start, self.processes + self.trained + self.saving)


def host_memory(
    architecture: Architecture,
    setup: Setup,
    *,
    num_nodes: int = 1,
    num_workers: int = 0,
    on_devices: bool = True,
) -> HostMemory:
    """Forecast what the job's first node needs beside its devices.

    Args:
        architecture: the network's sizes.
        setup: how it is trained.
        num_nodes: that share its processes equally.
        num_workers: loader processes of each process.
        on_devices: else it is the host that trains.
    """
    per_node = setup.num_devices / num_nodes
    rows = parameter_rows(architecture, setup)
    count = sum(row.num_parameters for row in rows)
    trained = sum(row.num_trainable for row in rows)
    weights = float(setup.weight_bytes * count)
    every, first = COPIES.get(setup.strategy, (0.0, 0.0))
    memory = device_memory(architecture, setup)
    held = memory.host / num_nodes
    if not on_devices:
        held += (memory.total - memory.overhead) * per_node
    # One process writes, from a copy; of DeepSpeed's parts every process, one flat tensor after the
    # other. The export is gathered whole where no process has all of it.
    saving = 3.0 * setup.weight_bytes * trained if setup.strategy in ("single", "ddp") else 0.0
    if setup.is_zero and setup.strategy != "zero3_offload":
        saving = 4.0 * trained / num_nodes
    if setup.strategy in ("fsdp2", "zero3", "zero3_offload"):
        saving = max(saving, weights)
    process = _PROCESS_BYTES + num_workers * _WORKER_BYTES + on_devices * _CUDA_BYTES
    return HostMemory(
        processes=per_node * process,
        copies=(every * per_node + first) * weights,
        trained=held,
        saving=saving,
        files=float(_STORED_BYTES * count),
    )


def machine_memory() -> float | None:
    """Return the bytes that this machine, or the container, may use; None where it does not say."""
    known: list[float] = []
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        known.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max`: no limit
            known.append(float(Path(path).read_text(encoding="ascii")))
    return min(known, default=None)
