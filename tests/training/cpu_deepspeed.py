"""Lightning's DeepSpeed strategy on CPU processes, which it refuses outside of tests."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from lightning.fabric.strategies import deepspeed as fabric_deepspeed
from lightning.pytorch.strategies import DeepSpeedStrategy, deepspeed
from lightning.pytorch.strategies.ddp import DDPStrategy

# The indices of devices are validated for accelerators that have some.
for module in (fabric_deepspeed, deepspeed):
    if hasattr(module, "_validate_device_index_selection"):
        module._validate_device_index_selection = lambda parallel_devices: None


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO with gloo; each process is a device with an index of its own."""

    @property
    def parallel_devices(self) -> list[torch.device]:
        return [torch.device("cpu", i) for i in range(2)]

    @parallel_devices.setter
    def parallel_devices(self, parallel_devices: list[torch.device] | None) -> None:
        pass

    def setup_environment(self) -> None:
        # DeepSpeed's own refuses accelerators other than CUDA and then does this.
        DDPStrategy.setup_environment(self)
