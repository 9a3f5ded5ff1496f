"""Which device to run on, and in which dtype; an explicit choice is checked, never changed."""

from __future__ import annotations

from typing import Final

import torch

from vipllava.models.tensor_files import FLOATS
from vipllava.types import ConfigError

_FIRST_WITH_BF16: Final = (8, 0)
"""Compute capability of Ampere. Older CUDA devices emulate bfloat16, slower than float32."""


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device that ``auto`` or a name means.

    Args:
        device: ``auto`` takes the first of CUDA, MPS (Apple's GPU) and CPU that is there.

    Raises:
        ConfigError: a named device is not there.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device={device!r} is not a device: use auto, cpu, cuda, cuda:N or mps"
        ) from None
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ConfigError(f"device={str(device)!r} is not there: use auto or cpu")
    return device


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a name means on a device.

    Args:
        dtype: ``auto`` is bfloat16 on CUDA devices that compute in it, float16 on older ones and
            on MPS, float32 on the CPU.
        device: where to run.

    Raises:
        ConfigError: the name is unknown, or the device does not compute in it.
    """
    if dtype != "auto" and dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not one of auto, {', '.join(FLOATS)}")
    has_bf16, name = True, device.type
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)  # which brought it
    if dtype == "bfloat16" and not has_bf16:
        raise ConfigError(f"dtype=bfloat16 is not computed by {name}: use auto, float16 or float32")
    if dtype != "auto":
        return FLOATS[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16 and device.type == "cuda" else torch.float16
