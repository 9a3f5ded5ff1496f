"""``train.py ... replay=FILE``: the samples of a step that the guard refused, one by one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

logger = logging.getLogger(__name__)

_SHOWN: Final = 20
"""Samples on the terminal; the files have all."""


def replay_job(cfg: DictConfig, console: Console | None = None) -> Path:
    """Compute a refused step again, print the worst samples, and write all of them.

    On one device, whatever the job's machine is, with the weights of the newest checkpoint before
    the step.

    Args:
        cfg: what Hydra composed from ``conf/train.yaml``, its data checked.
        console: where the table goes; the standard output if not given.

    Returns:
        A CSV file with a row for each sample; a page of what the model sees lies beside it.

    Raises:
        VipLlavaError: the record cannot be read, or data, model or checkpoint are others now.
    """
    import torch
    from rich.console import Console as MakeConsole
    from rich.table import Table

    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.commands.inspect import look_at, summary_of
    from vipllava.report.inspect_page import write_inspect_page
    from vipllava.training.guard import StepRecord
    from vipllava.training.job import build_datamodule, partial
    from vipllava.training.lit_module import HALF_DTYPES
    from vipllava.training.refused_step import load_weights, replay_losses, write_losses

    path = Path(cfg.replay)
    record = StepRecord.read(path)
    make_module = partial(cfg.module)
    spec = make_module.keywords["model"]
    tokenizer = load_tokenizer(spec)
    datamodule = build_datamodule(cfg, tokenizer, spec)
    micro_batches = datamodule.replay(
        record.place, record.data, world_size=record.world_size, accumulate=record.accumulate
    )
    module = make_module(seed=int(cfg.seed), tokenizer=tokenizer, gradient_checkpointing=False)
    module.configure_model()
    weights = "the first weights: there was no checkpoint yet"
    if record.checkpoint is not None:
        load_weights(module, Path(record.checkpoint))
        weights = f"the weights of {record.checkpoint}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = replay_losses(
        module, micro_batches, device=device, autocast=HALF_DTYPES.get(cfg.trainer.precision)
    )

    table = Table(title=f"step {record.step}: {record.reason}")
    table.add_column("sample", overflow="fold")
    for header in ("rank", "micro-batch", "tokens", "supervised", "loss"):
        table.add_column(header, justify="right")
    for sample in step.samples[:_SHOWN]:
        table.add_row(
            sample.key,
            str(sample.rank),
            str(sample.micro_batch),
            str(sample.num_tokens),
            str(sample.num_supervised),
            f"{sample.loss:.4f}",
        )
    console = console or MakeConsole()
    console.print(table)
    console.print(
        f"{len(step.samples)} samples, worst first; the global batch's loss is {step.loss:.4f} "
        f"with {weights}",
        highlight=False,
        soft_wrap=True,
    )
    losses = path.with_suffix(".csv")
    write_losses(step, losses)
    page = path.with_suffix(".html")
    items = {
        batch.keys[0]: item
        for micro_batch in micro_batches
        for item, batch in zip(micro_batch.items, micro_batch.single_samples, strict=True)
    }
    dataset = datamodule.dataset
    assert dataset is not None
    chosen = f"those of step {record.step}, worst first"
    summary = summary_of(cfg, datamodule, dataset, chosen=chosen)
    shown = [
        look_at(
            dataset.sources[item.part], datamodule.sample_encoder, item.position, item.epoch_pass
        )
        for item in (items[sample.key] for sample in step.samples)
    ]
    write_inspect_page(page, summary, shown)
    logger.info("every sample is in %s; what the model sees of each in %s", losses, page)
    return losses
