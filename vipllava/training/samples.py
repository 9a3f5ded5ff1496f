"""Pictures as the network gets them, with question, target and what it would have said.

A prediction is the most probable token at each supervised position, given the true tokens before
it. It is taken from the logits of the training step itself: there is no second forward pass, and no
process does anything that the others do not, so it works under every strategy.
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import lightning
import torch
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

FOLDER: Final = "samples"
COLUMNS: Final = ("step", "key", "picture", "question", "target", "prediction")


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample of a batch as a person reads it.

    Attributes:
        key: ``dataset/key``.
        picture: with its marks, as the network gets it; None for a text-only sample.
        question: what stands before each answer, one a line.
        target: the answers, one a line.
        prediction: the network's own tokens in their places, one answer a line.
    """

    key: str
    picture: Image.Image | None
    question: str
    target: str
    prediction: str


def shown_samples(
    batch: Batch,
    predictions: Predictions,
    tokenizer: FastTokenizer,
    *,
    image_token_id: int,
    limit: int,
) -> list[ShownSample]:
    """Return the first samples of a batch that have an answer.

    Args:
        batch: the micro-batch.
        predictions: what the network said.
        tokenizer: of its ids.
        image_token_id: the placeholder of a picture's features.
        limit: samples at most.
    """
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
    keys, next_picture = iter(batch.keys), 0
    for row in range(len(ids)):
        for segment in range(int(segments[row].max()) + 1):
            key, here = next(keys), segments[row] == segment
            picture = None
            if bool((ids[row][here] == image_token_id).any()):
                picture, next_picture = next_picture, next_picture + 1
            if len(shown) == limit or not bool(answered[row][here].any()):
                continue
            questions, targets, said_texts = [], [], []
            for is_answer, part in _runs(answered[row][here]):
                if is_answer:
                    targets.append(text(ids[row][here][part]))
                    said_texts.append(text(said[row][here][part]))
                else:
                    questions.append(text(ids[row][here][part]))
            shown.append(
                ShownSample(
                    key,
                    None if picture is None else _picture(batch.pixel_values[picture]),
                    "\n".join(questions[: len(targets)]),
                    "\n".join(targets),
                    "\n".join(said_texts),
                )
            )
    return shown


class SampleTable(Callback):
    """Shows a few training samples with the network's answers, at the first step and at intervals.

    They go to ``RUN_DIR/samples/STEP.jsonl`` with the pictures beside it, to Weights & Biases as a
    table, and to TensorBoard as pictures and texts. They are samples of the first process.

    Args:
        run_dir: the run's folder.
        every_n_steps: optimizer steps between two tables; the first is of step 0.
        num_samples: rows of a table.
        tokenizer: of the ids; that of the data module if None.
    """

    def __init__(
        self,
        run_dir: str | Path,
        every_n_steps: int = 500,
        num_samples: int = 4,
        tokenizer: FastTokenizer | None = None,
    ) -> None:
        self.directory = Path(run_dir) / FOLDER
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.tokenizer = tokenizer
        self._image_token_id = -1
        self._wanted: int | None = None
        self._shown_at = -1
        self._shown: list[ShownSample] = []

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Ask for the predictions; without a tokenizer there is nothing to show."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.tokenizer is None and isinstance(datamodule, VisualPromptDataModule):
            self.tokenizer = datamodule.encoder.tokenizer
        if not isinstance(pl_module, VipLlavaLitModule) or self.tokenizer is None:
            logger.info("no table of samples: the training data have no tokenizer")
            return
        config: Any = pl_module.network.config
        self._image_token_id = config.image_token_id
        if trainer.is_global_zero and self not in pl_module.observers:
            pl_module.observers.append(self)

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Choose the first micro-batch of the step that is shown."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self._shown_at
        self._wanted = step if due else None

    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Keep the samples of a chosen micro-batch."""
        if self._wanted is None or self.tokenizer is None:
            return
        self._shown_at = self._wanted
        self._shown = shown_samples(
            batch,
            predictions,
            self.tokenizer,
            image_token_id=self._image_token_id,
            limit=self.num_samples,
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Write what was kept."""
        shown, self._shown = self._shown, []
        if not shown:
            return
        write_samples(self.directory, shown, self._shown_at)
        for each in trainer.loggers:
            log_samples(each, shown, self._shown_at)


def write_samples(directory: Path, shown: list[ShownSample], step: int) -> Path:
    """Write ``STEP.jsonl`` and its pictures; return the file."""
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number, sample in enumerate(shown):
        name = None
        if sample.picture is not None:
            name = f"{step:06d}-{number}.jpg"
            sample.picture.save(directory / name, quality=90)
        values = (step, sample.key, name, sample.question, sample.target, sample.prediction)
        lines.append(json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False))
    path = directory / f"{step:06d}.jsonl"
    write_whole(path, "\n".join(lines) + "\n")
    return path


def log_samples(to: Logger, shown: list[ShownSample], step: int) -> None:
    """Give samples to a logger that can show pictures; others get nothing."""
    if isinstance(to, WandbLogger):
        wandb: Any = importlib.import_module("wandb")  # an extra
        rows = [
            [
                step,
                sample.key,
                None if sample.picture is None else wandb.Image(sample.picture),
                sample.question,
                sample.target,
                sample.prediction,
            ]
            for sample in shown
        ]
        to.log_table(SAMPLES, columns=list(COLUMNS), data=rows, step=step)
    elif isinstance(to, TensorBoardLogger):
        import numpy as np

        writer: Any = to.experiment
        for number, sample in enumerate(shown):
            name = f"{SAMPLES}/{number}"
            if sample.picture is not None:
                writer.add_image(name, np.asarray(sample.picture), step, dataformats="HWC")
            text = (
                f"{sample.key}\n\n**question** {sample.question}\n\n**target** {sample.target}"
                f"\n\n**prediction** {sample.prediction}"
            )
            writer.add_text(name, text, step)


def _runs(flags: torch.Tensor) -> list[tuple[bool, slice]]:
    """Cut a bool [length] into runs of equal values."""
    edges = (flags[1:] != flags[:-1]).nonzero().flatten().add(1).tolist()
    bounds = [0, *edges, len(flags)]
    return [(bool(flags[start]), slice(start, end)) for start, end in pairwise(bounds)]


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Turn uint8 [3, height, width] into a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
