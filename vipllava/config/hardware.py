"""What this machine has, as plain values that a test can make up."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from vipllava.config.attention import TORCH_VARLEN

# Three releases of flash attention share two import names: the distribution tells them apart.
_FLASH = {
    "flash_attn": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn",
}
OPTIONAL_PACKAGES = (
    "bitsandbytes", "deepspeed", "peft", "tensorboard", TORCH_VARLEN, "wandb", *_FLASH,
)  # fmt: skip
"""What not every installation has, by import name; flash attention by distribution."""

SHM: Final = Path("/dev/shm")
"""Where loader processes hand their batches over, on Linux."""
SHM_REMEDY: Final = "docker run --shm-size=16g (or --ipc=host), or machine.num_workers=0"


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA device."""

    name: str  # as the driver reports it
    memory_gib: float  # total (an "80 GB" A100 has 79.2)
    capability: tuple[int, int]  # compute capability; bf16 and flash attention need (8, 0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices and optional packages of one machine."""

    cuda: tuple[CudaDevice, ...] = ()  # the visible CUDA devices
    mps: bool = False  # whether Apple's Metal backend is there
    num_cpus: int = 1  # cores this process may use
    cpu_bf16: bool = False  # whether the CPU multiplies bf16 matrices in hardware
    installed: frozenset[str] = frozenset()  # those of ``OPTIONAL_PACKAGES`` that are there

    @property
    def least_capability(self) -> tuple[int, int] | None:
        """The least compute capability of the CUDA devices; None without any."""
        return min((device.capability for device in self.cuda), default=None)

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

    installed = installed_packages()
    if torch.version.cuda and not torch.backends.cuda.is_flash_attention_available():
        installed -= {TORCH_VARLEN}  # built without the kernels, as some for Windows are
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = [torch.cuda.get_device_properties(index) for index in range(count)]
    # A container may see many cores and be allowed two.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    of_cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return Hardware(
        tuple(CudaDevice(d.name, d.total_memory / 2**30, (d.major, d.minor)) for d in cuda),
        mps=torch.backends.mps.is_available(),
        num_cpus=allowed or os.cpu_count() or 1,
        cpu_bf16=bool(of_cpu.get("avx512_bf16") or of_cpu.get("amx_bf16")),
        installed=installed,
    )


def free_shm() -> int | None:
    """Return the free bytes of shared memory; None where a system has none."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else None


def installed_packages() -> frozenset[str]:
    """Return which of ``OPTIONAL_PACKAGES`` are there, without importing them."""
    return frozenset(name for name in OPTIONAL_PACKAGES if _is_installed(name))


def capability_of(number: float) -> tuple[int, int]:
    """Return a compute capability as CUDA has it, e.g. (8, 6) of 8.6."""
    return int(number), round(number * 10) % 10


def _is_installed(name: str) -> bool:
    if name == TORCH_VARLEN:
        torch = find_spec("torch")
        folders = torch and torch.submodule_search_locations
        return any((Path(f) / "nn/attention/varlen.py").is_file() for f in folders or ())
    if name in _FLASH:
        with suppress(PackageNotFoundError):
            distribution(name)
            return find_spec(_FLASH[name]) is not None
        return False
    return find_spec(name) is not None
