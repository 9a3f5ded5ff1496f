"""Lightning's DeepSpeed strategy on CPU processes, which it refuses outside of tests."""

from __future__ import annotations

import importlib
import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from deepspeed.accelerator import get_accelerator
from lightning.fabric.strategies import deepspeed as fabric_deepspeed
from lightning.pytorch.strategies import deepspeed
from lightning.pytorch.strategies.ddp import DDPStrategy

from vipllava.training.deepspeed_strategy import ElasticDeepSpeedStrategy

# The indices of devices are validated for accelerators that have some.
for module in (fabric_deepspeed, deepspeed):
    if hasattr(module, "_validate_device_index_selection"):
        module._validate_device_index_selection = lambda parallel_devices: None

# Its own collective for one machine would be compiled first, for half a minute.
_comm: Any = importlib.import_module("deepspeed.comm.torch")
_comm.build_shm_op = lambda: None
# Asks for fast kernels; PyTorch computes in float16 on every CPU.
_accelerator: Any = get_accelerator()
_accelerator.is_fp16_supported = lambda: True


class CpuDeepSpeedStrategy(ElasticDeepSpeedStrategy):
    """ZeRO with gloo; each process is a device with an index of its own."""

    @property
    def parallel_devices(self) -> list[torch.device]:
        return [torch.device("cpu", i) for i in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))]

    @parallel_devices.setter
    def parallel_devices(self, parallel_devices: list[torch.device] | None) -> None:
        pass

    def setup_environment(self) -> None:
        # DeepSpeed's own refuses accelerators other than CUDA and then does this.
        DDPStrategy.setup_environment(self)
