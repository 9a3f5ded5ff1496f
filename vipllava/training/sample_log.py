"""Images as the network gets them, with question, target and what it would have said.

A prediction is the most probable token at each supervised position, given the true tokens before
it, from the logits of the training step itself.
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from vipllava.conversation.pieces import FastTokenizer
from vipllava.files.atomic import write_whole
from vipllava.models.supervised_loss import Predictions
from vipllava.stream.datamodule import VisualPromptDataModule
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.metrics import SAMPLES
from vipllava.types import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample of a batch as a person reads it."""

    key: str  # ``dataset/key``
    image: Image.Image | None  # with its marks, as the network gets it; None for a text-only sample
    question: str  # what stands before each answer, one a line
    target: str  # the answers, one a line
    prediction: str  # the network's own tokens in their places, one answer a line

    def row(self, step: int, image: Any) -> dict[str, Any]:
        """Return what a table shows, with what stands for the image."""
        texts = {"question": self.question, "target": self.target, "prediction": self.prediction}
        return {"step": step, "key": self.key, "image": image, **texts}


def shown_samples(
    batch: Batch,
    predictions: Predictions,
    tokenizer: FastTokenizer,
    *,
    image_token_id: int,
    limit: int,
    system: str = "",
) -> list[ShownSample]:
    """Return the first samples of a micro-batch, at most ``limit``, that have an answer.

    Questions are shown without ``system``, the template's text before the first of them.
    """
    opening = " ".join(system.split())
    ids, segments = batch.input_ids.cpu(), batch.segment_ids.cpu()
    answered = torch.zeros_like(ids, dtype=torch.bool)
    answered[:, 1:] = predictions.supervised.cpu()
    said = torch.zeros_like(ids)
    said[answered] = predictions.logits.argmax(dim=-1).cpu()

    def text(tokens: torch.Tensor) -> str:
        kept = tokens[tokens != image_token_id].tolist()
        decoded = tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=True)
        return " ".join(decoded.split())

    shown: list[ShownSample] = []
    keys, images = iter(batch.keys), iter(batch.pixel_values)
    for row, row_segments in enumerate(segments):
        for segment in range(int(row_segments.max()) + 1):
            key, here = next(keys), row_segments == segment
            own_ids, own_answered, own_said = ids[row][here], answered[row][here], said[row][here]
            pixels = next(images) if bool((own_ids == image_token_id).any()) else None
            if len(shown) == limit or not bool(own_answered.any()):
                continue
            questions, targets, said_texts = [], [], []
            for is_answer, part in _runs(own_answered):
                (targets if is_answer else questions).append(text(own_ids[part]))
                if is_answer:
                    said_texts.append(text(own_said[part]))
            image = None
            if pixels is not None:  # uint8 [3, height, width]
                image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
            if questions:
                questions[0] = questions[0].removeprefix(opening).lstrip()
            texts = ("\n".join(x) for x in (questions[: len(targets)], targets, said_texts))
            shown.append(ShownSample(key, image, *texts))
    return shown


@dataclass(eq=False)
class SampleTable(Callback):
    """Shows a few samples of the first process with the network's answers, at intervals.

    They go to ``RUN_DIR/samples/STEP.jsonl`` with the images beside it, to Weights & Biases as a
    table, and to TensorBoard as images and texts.
    """

    run_dir: str | Path  # the run's folder
    every_n_steps: int = 500  # optimizer steps between two tables; the first is of step 0
    num_samples: int = 4  # rows of a table
    tokenizer: FastTokenizer | None = None  # of the ids; that of the data module if None
    system: str = ""  # the template's text before the first question, not shown; likewise
    _trainer: Trainer | None = field(default=None, init=False)
    _image_token_id: int = field(default=-1, init=False)
    _shown_at: int = field(default=-1, init=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the predictions; without a tokenizer there is nothing to show."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.tokenizer is None and isinstance(datamodule, VisualPromptDataModule):
            self.tokenizer = datamodule.conversation_encoder.tokenizer
            self.system = datamodule.conversation_encoder.template.system
        if not isinstance(pl_module, VipLlavaLitModule) or self.tokenizer is None:
            logger.info("no table of samples: the training data have no tokenizer")
            return
        config: Any = pl_module.network.config
        self._trainer, self._image_token_id = trainer, config.image_token_id
        if trainer.is_global_zero and self not in pl_module.observers:
            pl_module.observers.append(self)

    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Show samples of the first micro-batch of a step that is due."""
        trainer, tokenizer = self._trainer, self.tokenizer
        if trainer is None or tokenizer is None:
            return
        step = trainer.global_step
        if step % self.every_n_steps or step == self._shown_at:
            return
        self._shown_at = step
        told: Any = {"image_token_id": self._image_token_id, "limit": self.num_samples}
        if shown := shown_samples(batch, predictions, tokenizer, system=self.system, **told):
            _write_samples(Path(self.run_dir) / "samples", shown, step)
            for each in trainer.loggers:
                log_samples(each, shown, step)


def _write_samples(directory: Path, shown: list[ShownSample], step: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = ""
    for number, sample in enumerate(shown):
        name = None
        if sample.image is not None:
            name = f"{step:06d}-{number}.jpg"
            sample.image.save(directory / name, quality=90)
        text += json.dumps(sample.row(step, name), ensure_ascii=False) + "\n"
    write_whole(directory / f"{step:06d}.jsonl", text)


def log_samples(to: Logger, shown: list[ShownSample], step: int) -> None:
    """Give samples to a logger that can show images; others get nothing."""
    if isinstance(to, WandbLogger):
        wandb: Any = importlib.import_module("wandb")  # an extra
        rows = [s.row(step, s.image and wandb.Image(s.image)) for s in shown]
        values = [list(row.values()) for row in rows]
        to.log_table(SAMPLES, columns=list(rows[0]), data=values, step=step)
    elif isinstance(to, TensorBoardLogger):
        writer: Any = to.experiment
        for number, sample in enumerate(shown):
            name = f"{SAMPLES}/{number}"
            if sample.image is not None:
                writer.add_image(name, np.asarray(sample.image), step, dataformats="HWC")
            told = ("question", "target", "prediction")
            texts = [sample.key, *(f"**{each}** {getattr(sample, each)}" for each in told)]
            writer.add_text(name, "\n\n".join(texts), step)


def _runs(flags: torch.Tensor) -> list[tuple[bool, slice]]:
    """Cut a bool [length] into runs of equal values."""
    edges = (flags[1:] != flags[:-1]).nonzero().flatten().add(1).tolist()
    bounds = [0, *edges, len(flags)]
    return [(bool(flags[start]), slice(start, end)) for start, end in pairwise(bounds)]
