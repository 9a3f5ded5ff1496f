"""CUDA devices that are not there: what would a GPU run do, asserted on a CPU.

Every decision that looks at the device sees CUDA devices: the configuration's, Lightning's (which
accelerator, precision plugin, strategy and device), torch's (is there CUDA, of what capability).
The tensors themselves stay on the CPU: what asks for a CUDA device gets a CPU tensor, so that a run
with ``trainer=1gpu`` goes through its whole first step here. What only a device can show (kernels,
streams, memory) is for ``pytest -m gpu``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.overrides import TorchFunctionMode

from vipllava.config import hardware
from vipllava.config.hardware import OPTIONAL_PACKAGES, TORCH_VARLEN, CudaDevice, Hardware

DEVICES = {
    "A100": CudaDevice("NVIDIA A100-SXM4-80GB", 79.2, (8, 0)),
    "A100-40G": CudaDevice("NVIDIA A100-SXM4-40GB", 39.4, (8, 0)),
    "A6000": CudaDevice("NVIDIA RTX A6000", 47.5, (8, 6)),
    "RTX3090": CudaDevice("NVIDIA GeForce RTX 3090", 23.7, (8, 6)),
    "V100": CudaDevice("Tesla V100-SXM2-32GB", 31.7, (7, 0)),
    "H100": CudaDevice("NVIDIA H100 80GB HBM3", 79.2, (9, 0)),
    "H200": CudaDevice("NVIDIA H200", 139.8, (9, 0)),
}
_KERNELS = frozenset({"flash_attn", "flash_attn_3", "flash_attn_4", TORCH_VARLEN})
PACKAGES = frozenset(OPTIONAL_PACKAGES) - _KERNELS
"""All but the kernels: with them the attention of a run could not be computed here."""


@dataclass
class Seen:
    """What was done to the devices.

    Attributes:
        pinned: bytes of host memory that were pinned: batches.
        copied: bytes of those that were copied to a device.
        waited: bytes of those whose copy was waited for.
        moved: bytes of all other tensors that were copied to a device: weights.
    """

    pinned: int = 0
    copied: int = 0
    waited: int = 0
    moved: int = 0


def machine(device: str, count: int, installed: frozenset[str] = PACKAGES) -> Hardware:
    """Return a machine of ``count`` devices of :data:`DEVICES`."""
    return Hardware((DEVICES[device],) * count, num_cpus=16, installed=installed)


@contextmanager
def cuda_double(here: Hardware) -> Iterator[Seen]:
    """Let everybody believe that this machine is ``here``."""
    for name in ("deepspeed", "peft"):  # which look for kernels when they are imported
        with suppress(ImportError):
            importlib.import_module(name)
    first = here.cuda[0]
    seen, patches = Seen(), ExitStack()
    major, minor = first.capability
    properties = mock.Mock(total_memory=int(first.memory_gib * 2**30), major=major, minor=minor)
    hardware.detect()  # it looks once in a process: seen here first, no double stays in it
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: len(here.cuda),
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: first.name,
        "get_device_capability": lambda device=None: first.capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda **_: first.capability >= (8, 0),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (64 * 2**30, 64 * 2**30),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
        "get_rng_state": lambda device=None: torch.empty(0),
        "set_rng_state": lambda state, device=None: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for module, values in (
        (torch.cuda, answers),
        (hardware, {"detect": lambda: here, "installed_packages": lambda: here.installed}),
        (
            torch.accelerator,
            {
                "is_available": lambda: True,
                "current_accelerator": lambda *_, **__: torch.device("cuda"),
                "current_stream": lambda *_: mock.Mock(is_capturing=lambda: False),
            },
        ),
        (torch.distributed, {"init_process_group": _init_with_gloo}),
        (DDPStrategy, {"determine_ddp_device_ids": lambda self: None}),
        # The same precision, computed where the tensors are.
        (MixedPrecision, {"autocast_context_manager": _autocast_on_cpu}),
    ):
        for name, value in values.items():
            patches.enter_context(mock.patch.object(module, name, value))
    with patches, _CudaOnCpu(seen):
        yield seen


_init_process_group = torch.distributed.init_process_group


def _init_with_gloo(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    kwargs.pop("device_id", None)
    _init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)


def _autocast_on_cpu(plugin: MixedPrecision) -> torch.autocast:
    dtype = torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
    return torch.autocast("cpu", dtype, cache_enabled=False)


class _CudaOnCpu(TorchFunctionMode):
    """Whoever asks for a CUDA device gets the CPU."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.pinned: list[torch.Tensor] = []  # alive, so that no other takes its place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            self.seen.pinned += args[0].nbytes
            self.pinned.append(args[0])
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0]
        if func is not torch.device and any(_is_cuda(value) for value in (*args, *kwargs.values())):
            if func is torch.Tensor.to:
                self._copied(args[0], waited=not kwargs.get("non_blocking"))
            args = tuple(_on_cpu(value) for value in args)
            kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _copied(self, tensor: torch.Tensor, *, waited: bool) -> None:
        if not any(tensor is other for other in self.pinned):
            self.seen.moved += tensor.nbytes
            return
        self.seen.copied += tensor.nbytes
        self.seen.waited += tensor.nbytes * waited


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if _is_cuda(value) else value
