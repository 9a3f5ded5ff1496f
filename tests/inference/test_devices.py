"""A device or dtype that is named is checked; ``auto`` takes what the machine computes best."""

from __future__ import annotations

import pytest
import torch

from vipllava.inference.devices import resolve_device, resolve_dtype
from vipllava.types import ConfigError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch):
    """Pretend that a GPU is there."""

    def make(*, capability=None, macos=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: macos is not None)
        newer = lambda major, minor: macos is not None and macos >= (major, minor)  # noqa: E731
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", newer)

    return make


def test_auto_takes_the_first_that_is_there(machine):
    machine()
    assert resolve_device("auto") == CPU
    machine(macos=(14, 0))
    assert resolve_device("auto") == MPS
    machine(capability=(9, 0), macos=(14, 0))
    assert resolve_device("auto") == CUDA


@pytest.mark.parametrize(
    ("there", "device", "dtype"),
    [
        ({}, CPU, torch.float32),
        ({"capability": (7, 0)}, CUDA, torch.float16),
        ({"capability": (8, 6)}, CUDA, torch.bfloat16),
        ({"macos": (13, 0)}, MPS, torch.float16),
        ({"macos": (15, 0)}, MPS, torch.float16),
    ],
)
def test_the_dtype_that_a_device_supports(machine, there, device, dtype):
    machine(**there)
    assert resolve_dtype("auto", device) == dtype
    assert resolve_dtype("float32", device) == torch.float32
    assert resolve_dtype("float16", device) == torch.float16


def test_bfloat16_where_it_is_not_computed(machine):
    machine(capability=(7, 0))
    with pytest.raises(ConfigError, match="dtype=bfloat16 is not computed by Tesla V100: use auto"):
        resolve_dtype("bfloat16", CUDA)
    machine(macos=(13, 0))
    with pytest.raises(ConfigError, match="is not computed by mps: use auto"):
        resolve_dtype("bfloat16", MPS)
    machine(macos=(14, 0))
    assert resolve_dtype("bfloat16", MPS) == torch.bfloat16
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match="dtype='int3' is not one of auto, float32"):
        resolve_dtype("int3", CPU)
    with pytest.raises(ConfigError, match="is not a device"):
        resolve_device("toaster")
    with pytest.raises(ConfigError, match="is not there: use auto or cpu"):
        resolve_device("cuda:99")
