"""Callbacks of a stage: the table of what trains, and the export at the end."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.adapter_format import save_adapter
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.llava_format import save_projector
from vipllava.models.adapters import merge_adapters
from vipllava.models.freezing import ParameterRow, parameter_table
from vipllava.training.first_alone import first_alone
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.sharding import whole_network
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
"""Name of the folder of a run's adapters, beside its export."""

PROJECTOR_FOLDER = "projector"
"""Name of the folder of what a stage-1 run trained, beside its export."""


def render_parameter_table(rows: tuple[ParameterRow, ...]) -> Table:
    """Return the table of parts, their weights and those that train."""
    table = Table(title="Parameters")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for row in rows:
        table.add_row(row.part, f"{row.num_parameters:,}", f"{row.num_trainable:,}")
    table.add_section()
    counts = [(row.num_parameters, row.num_trainable) for row in rows]
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*counts, strict=True)))
    return table


class ParameterTable(Callback):
    """Shows which parts train when fit starts, on the first rank.

    Args:
        console: where to print it; stderr if not given, beside the log.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if not trainer.is_global_zero:
            return
        rows = parameter_table(_network_of(pl_module).network)
        (self._console or Console(stderr=True)).print(render_parameter_table(rows))
        for row in rows:
            logger.info(
                "%s: %s parameters, %s trainable", row.part, row.num_parameters, row.num_trainable
            )


class ExportCallback(Callback):
    """Writes the trained network as a Hugging Face folder when training has ended.

    An interrupted or failed run writes nothing, and a folder appears only when it is complete. A
    run with adapters writes these, with the projector, into ``adapter`` beside the folder, and the
    folder holds them merged. One that trains the projector alone (stage 1) writes it into
    ``projector``, too.

    Args:
        directory: the folder to write; one of an earlier run is replaced.
        tokenizer: saved with the weights.
        meta: what the folder says about itself.
        base: what adapters belong on: the folder or id that the run started from.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerFast,
        meta: ExportMeta,
        base: str = "",
    ) -> None:
        self.directory = Path(directory)
        self.tokenizer = tokenizer
        self.meta = meta
        self.base = base

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on the first rank; the others wait, see :func:`first_alone`."""
        module = _network_of(pl_module)
        network = whole_network(module.network, trainer.strategy, module.adapter)

        def export() -> None:
            assert network is not None
            self._export(network, module)

        first_alone(trainer.is_global_zero, f"exporting the model to {self.directory}", export)

    def _export(self, network: VipLlavaForConditionalGeneration, module: VipLlavaLitModule) -> None:
        if module.adapter is not None:
            adapter = self.directory.with_name(ADAPTER_FOLDER)
            save_adapter(network, adapter, self.meta, base=self.base, settings=module.adapter)
            logger.info("wrote the adapter to %s", adapter)
            merge_adapters(network)
        save_export(network, self.tokenizer, self.directory, self.meta)
        logger.info("exported the model to %s", self.directory)
        if tuple(module.trainable) == ("projector",):
            folder = save_projector(network, self.directory.with_name(PROJECTOR_FOLDER))
            logger.info("wrote what was trained, the projector alone, to %s", folder)


def _network_of(module: LightningModule) -> VipLlavaLitModule:
    if not isinstance(module, VipLlavaLitModule):
        raise VipLlavaError(
            f"this callback belongs to VipLlavaLitModule, not to {type(module).__name__}"
        )
    return module
