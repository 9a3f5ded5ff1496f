"""Callbacks of a stage: what a run starts with, the table of what trains, and the export."""

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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.adapter_format import save_adapter
from vipllava.checkpoints.export_meta import ExportMeta, code_version
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.llava_format import save_projector
from vipllava.config import hardware
from vipllava.config.attention import attention_candidates, explain_attention
from vipllava.files.atomic import write_whole
from vipllava.models.adapters import merge_adapters
from vipllava.models.freezing import ParameterRow, parameter_table
from vipllava.training.first_alone import first_alone
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.restart import move_aside
from vipllava.training.sharding import whole_network
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

_PACKAGES: Final = (
    "torch", "lightning", "transformers", "tokenizers", "safetensors", "webdataset", "numpy",
    "pillow", "hydra-core", "omegaconf", "deepspeed", "peft", "bitsandbytes", "flash-attn",
    "flash-attn-3", "flash-attn-4", "wandb",
)  # fmt: skip


@dataclass(eq=False)
class StartLog(Callback):
    """Writes down what a run starts with, before any weight is loaded.

    It goes to ``RUN_DIR/environment.json`` and as hyper-parameters to every logger.
    """

    run_dir: str | Path  # the run's folder
    configuration: Mapping[str, Any]  # the resolved job as plain values

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, on the first process."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        module: Any = pl_module
        machine, on_cuda = hardware.detect(), trainer.strategy.root_device.type == "cuda"
        capability = machine.least_capability if on_cuda else None
        rows = attention_candidates(machine.installed, capability, str(trainer.precision))
        attention = explain_attention(module.spec.attn_implementation, rows)
        logger.info("attention: %s", attention)
        ranks = {"processes": trainer.world_size, "nodes": trainer.num_nodes}
        environment = _environment() | ranks | {"attention": attention}
        about = {"code": code_version(), "environment": environment}
        values = {**about, "configuration": self.configuration}
        text = json.dumps(values, indent=1, default=str) + "\n"
        write_whole(Path(self.run_dir) / "environment.json", text)
        for log in trainer.loggers:
            log.log_hyperparams({**self.configuration, **about})


def _environment() -> dict[str, Any]:
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


def render_parameter_table(rows: tuple[ParameterRow, ...]) -> Table:
    """Return the table of parts, their weights and those that train."""
    table = Table("part", title="Parameters")
    for header in ("parameters", "trainable"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(row.part, f"{row.num_parameters:,}", f"{row.num_trainable:,}")
    table.add_section()
    counts = [(row.num_parameters, row.num_trainable) for row in rows]
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*counts, strict=True)))
    return table


@dataclass(eq=False)
class ParameterTable(Callback):
    """Says which parts train when fit starts, on the first rank: one message, a line for each."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it to the log, which is the terminal, too."""
        if not trainer.is_global_zero:
            return
        table = "".join(
            f"\n  {row.part:<16}{row.num_parameters:>16,} parameters,{row.num_trainable:>15,} train"
            for row in parameter_table(_ours(pl_module).network)
        )
        logger.info("what trains:%s", table)


@dataclass(eq=False)
class ExportCallback(Callback):
    """Writes the trained network as a Hugging Face folder when training has ended whole.

    A run with adapters writes these, with the projector, into ``adapter`` beside the folder, which
    holds them merged. One that trains the projector alone writes it into ``projector``, too.
    """

    directory: Path  # the folder to write; an earlier one is moved to ``before-N`` beside it
    tokenizer: PreTrainedTokenizerFast  # saved with the weights
    meta: ExportMeta  # what the folder says about itself
    base: str = ""  # what adapters belong on: the folder or id that the run started from

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on the first rank; the others wait, see :func:`first_alone`."""
        module = _ours(pl_module)
        network: Any = whole_network(module.network, trainer.strategy, module.adapter)
        what = f"exporting the model to {self.directory}"
        first_alone(trainer.is_global_zero, what, lambda: self._export(network, module))

    def _export(self, network: VipLlavaForConditionalGeneration, module: VipLlavaLitModule) -> None:
        names = (self.directory.name, "adapter", "projector")
        folders = [self.directory.with_name(name) for name in names]
        if earlier := [folder for folder in folders if folder.is_dir()]:
            aside = move_aside(self.directory.parent, earlier)
            logger.info("the export of before, with all that was put there, is in %s", aside)
        if module.adapter is not None:
            adapter = self.directory.with_name("adapter")
            save_adapter(network, adapter, self.meta, base=self.base, settings=module.adapter)
            logger.info("wrote the adapter to %s", adapter)
            merge_adapters(network)
        save_export(network, self.tokenizer, self.directory, self.meta)
        logger.info("exported the model to %s", self.directory)
        if tuple(module.trainable) == ("projector",):
            folder = save_projector(network, self.directory.with_name("projector"))
            logger.info("wrote what was trained, the projector alone, to %s", folder)


def _ours(module: LightningModule) -> VipLlavaLitModule:
    if not isinstance(module, VipLlavaLitModule):
        raise VipLlavaError(
            f"this callback belongs to VipLlavaLitModule, not to {type(module).__name__}"
        )
    return module
