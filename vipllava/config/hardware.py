"""What this machine has, as plain values that a test can make up."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec

OPTIONAL_PACKAGES = ("bitsandbytes", "deepspeed", "flash_attn", "peft", "tensorboard", "wandb")
"""Import names of what the extras bring and a configuration may ask for."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA device.

    Attributes:
        name: as the driver reports it.
        memory_gib: total memory, GiB (an "80 GB" A100 has 79.2).
        capability: compute capability; bf16 and flash attention need (8, 0).
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices and optional packages of one machine.

    Attributes:
        cuda: the visible CUDA devices.
        mps: whether Apple's Metal backend is there.
        num_cpus: cores this process may use.
        cpu_bf16: whether the CPU multiplies bf16 matrices in hardware.
        installed: those of ``OPTIONAL_PACKAGES`` that can be imported.
    """

    cuda: tuple[CudaDevice, ...] = ()
    mps: bool = False
    num_cpus: int = 1
    cpu_bf16: bool = False
    installed: frozenset[str] = field(default_factory=frozenset[str])

    def describe(self) -> str:
        """Say in a few words which devices there are, e.g. ``2 CUDA devices (T4 15 GiB, ...)``."""
        if not self.cuda:
            return "0 CUDA devices" + (" (Apple MPS is there)" if self.mps else "")
        names = ", ".join(f"{d.name} {d.memory_gib:.0f} GiB" for d in self.cuda)
        return f"{len(self.cuda)} CUDA device{'s' if len(self.cuda) > 1 else ''} ({names})"


@lru_cache(maxsize=1)
def detect() -> Hardware:
    """Look at this machine; imports torch, and only here."""
    import torch

    cuda: list[CudaDevice] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            cuda.append(
                CudaDevice(
                    name=properties.name,
                    memory_gib=properties.total_memory / 2**30,
                    capability=(properties.major, properties.minor),
                )
            )
    return Hardware(
        cuda=tuple(cuda),
        mps=torch.backends.mps.is_available(),
        num_cpus=_usable_cpus(),
        cpu_bf16=_cpu_multiplies_bf16(),
        installed=installed_packages(),
    )


def installed_packages() -> frozenset[str]:
    """Return which of ``OPTIONAL_PACKAGES`` can be imported, without importing them."""
    return frozenset(name for name in OPTIONAL_PACKAGES if find_spec(name) is not None)


def _cpu_multiplies_bf16() -> bool:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _usable_cpus() -> int:
    # A container may see many cores and be allowed two.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
