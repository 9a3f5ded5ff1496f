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

    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.commands.inspect import write_page
    from vipllava.commands.output import rows_table
    from vipllava.training.guard import StepRecord, load_weights, replay_losses, write_losses
    from vipllava.training.job import build_datamodule, partial
    from vipllava.training.lit_module import HALF_DTYPES

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

    rows = [
        (
            sample.key,
            *map(str, (sample.rank, sample.micro_batch, sample.num_tokens, sample.num_supervised)),
            f"{sample.loss:.4f}",
        )
        for sample in step.samples[:_SHOWN]
    ]
    numbers = ("rank", "micro-batch", "tokens", "supervised", "loss")
    title = f"step {record.step}: {record.reason}"
    console = console or MakeConsole()
    console.print(rows_table(title, ("sample", *numbers), rows, right=numbers))
    console.print(
        f"{len(step.samples)} samples, worst first; the global batch's loss is {step.loss:.4f} "
        f"with {weights}",
        highlight=False,
        soft_wrap=True,
    )
    losses = path.with_suffix(".csv")
    write_losses(step, losses)
    logger.info("the loss of every sample is in %s", losses)
    items = {
        batch.keys[0]: item
        for micro_batch in micro_batches
        for item, batch in zip(micro_batch.items, micro_batch.single_samples, strict=True)
    }
    dataset = datamodule.dataset
    assert dataset is not None
    shown = [items[sample.key] for sample in step.samples]
    more = {
        "chosen": f"those of step {record.step}, worst first",
        "remarks": [f"loss {sample.loss:.4f}" for sample in step.samples],
    }
    write_page(path.with_suffix(".html"), cfg, datamodule, dataset, shown, **more)
    return losses
