"""What a run was made with: configuration, code, packages, devices, command."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from vipllava.checkpoints.export_meta import code_version
from vipllava.config import hardware
from vipllava.config.attention import attention_candidates, explain_attention
from vipllava.files.atomic import write_whole

_logger = logging.getLogger(__name__)

FILE: Final = "environment.json"
_PACKAGES: Final = (
    "torch", "lightning", "transformers", "tokenizers", "safetensors", "webdataset", "numpy",
    "pillow", "hydra-core", "omegaconf", "deepspeed", "peft", "bitsandbytes", "flash-attn",
    "flash-attn-3", "flash-attn-4", "wandb",
)  # fmt: skip


def describe_attention(used: str, trainer: Trainer) -> str:
    """Say which attention a run's network gets, and why not a faster one.

    Args:
        used: the implementation, as the model's spec names it.
        trainer: with the devices and the precision.
    """
    machine = hardware.detect()
    on_cuda = trainer.strategy.root_device.type == "cuda"
    capability = machine.least_capability if on_cuda else None
    rows = attention_candidates(machine.installed, capability, str(trainer.precision))
    return explain_attention(used, rows)


def describe_environment() -> dict[str, Any]:
    """Return this process's command, Python, packages and devices as plain values."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cuda = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "devices": cuda or [platform.machine()],
        "cpus": os.cpu_count(),
    }


class StartLog(Callback):
    """Writes down what a run starts with, before any weight is loaded.

    It goes to ``RUN_DIR/environment.json`` and as hyper-parameters to every logger; which attention
    was chosen, and why, is also a line of the log.

    Args:
        run_dir: the run's folder.
        configuration: the resolved job as plain values.
    """

    def __init__(self, run_dir: str | Path, configuration: Mapping[str, Any]) -> None:
        self.path = Path(run_dir) / FILE
        self.configuration = dict(configuration)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, on the first process."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        module: Any = pl_module
        attention = describe_attention(module.spec.attn_implementation, trainer)
        _logger.info("attention: %s", attention)
        about = {
            "code": code_version(),
            "environment": describe_environment()
            | {"processes": trainer.world_size, "nodes": trainer.num_nodes, "attention": attention},
        }
        values = {**about, "configuration": self.configuration}
        write_whole(self.path, json.dumps(values, indent=1, default=str) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams({**self.configuration, **about})
