"""Which device to run on, and in which dtype; an explicit choice is checked, never changed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Final

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


def dispatch(model: Any, device_map: str | Mapping[str, Any]) -> None:
    """Spread a network that is on the host over several devices, in place, by accelerate.

    Args:
        model: a VipLlava.
        device_map: ``auto`` fills the devices that are there, in their order, as far as each has
            memory, and the host with what is left; or module names and the device of each.

    Raises:
        ConfigError: accelerate is not installed, or the map is of another kind.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            f"device_map={device_map!r} needs accelerate, which is not installed: "
            'pip install "vipllava-lightning[lora]"'
        )
    import accelerate

    if device_map == "auto":
        # Tower and blocks stay whole: what they add up lies on one device.
        tower = type(model.model.vision_tower).__name__
        whole = [tower, *(model.model.language_model._no_split_modules or ())]
        memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=whole)
        device_map = accelerate.infer_auto_device_map(
            model, max_memory=memory, no_split_module_classes=whole
        )
    elif isinstance(device_map, str):
        raise ConfigError(f"device_map={device_map!r} is not known: use auto, or name modules")
    accelerate.dispatch_model(model, device_map=dict(device_map), force_hooks=True)
