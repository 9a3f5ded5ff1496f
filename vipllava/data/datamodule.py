"""Wiring of one training stage's data for Lightning. What happens is in the other modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from vipllava.config.batch import accumulation_steps
from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.label_proof import prove_labels
from vipllava.data.image_transform import ImageTransform
from vipllava.data.manifest import load_manifest
from vipllava.data.samples import SampleEncoder, SampleSource
from vipllava.data.stream import GlobalBatchSampler, StepLoader, VisualPromptDataset
from vipllava.types import ConfigError
from vipllava.visual_prompts.policies import VisualPromptPolicy

log = logging.getLogger(__name__)


class VisualPromptDataModule(lightning.LightningDataModule):
    """Training data of one stage.

    Args:
        manifest: name in ``manifests_dir``, or path of a manifest of one's own.
        manifests_dir: folder of the known manifests.
        data_root: folder that the manifests' patterns are relative to.
        policies: visual-prompt policies by name.
        encoder: conversations to ids and labels.
        image_transform: pictures to pixels.
        micro_batch_size: samples per rank and forward pass.
        global_batch_size: samples per optimizer step.
        seed: of order, wordings and marks.
        num_workers: loader processes per rank.
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
        num_proved: how many of the first samples get their labels proved before training.
    """

    def __init__(
        self,
        manifest: str | Path,
        manifests_dir: str | Path,
        data_root: str | Path,
        policies: Mapping[str, VisualPromptPolicy],
        encoder: ConversationEncoder,
        image_transform: ImageTransform,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int = 42,
        num_workers: int = 4,
        pad_to_multiple_of: int = 1,
        num_proved: int = 16,
    ) -> None:
        super().__init__()
        self.manifest = load_manifest(manifest, manifests_dir)
        self.data_root = Path(data_root)
        self.encoder = encoder
        self.samples = SampleEncoder(policies, encoder, image_transform, seed)
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_proved = num_proved
        self.dataset: VisualPromptDataset | None = None
        self._loader: StepLoader | None = None

    def setup(self, stage: str) -> None:
        """Open the shards and prove the labels of the first samples.

        Raises:
            ShardError: the data are missing, damaged or not what the manifest says.
            RecordError: one of the first samples breaks its schema.
            VipLlavaError: labels do not cover exactly the answers.
        """
        if self.dataset is not None:
            return
        source = self.open_source()
        self.dataset = VisualPromptDataset(source, self.samples)
        proved = self.first_positions(source, self.num_proved)
        for position in proved:
            sample = source.sample(position)
            turns, encoded = self.samples.encode_text(sample)
            prove_labels(self.encoder, turns, encoded, key=f"{sample.dataset}/{sample.key}")
        log.info("%s: %d samples, labels of %d proved", source.name, len(source), len(proved))

    def open_source(self) -> SampleSource:
        """Open the shards; raises what :func:`vipllava.data.shards.open_shards` raises."""
        return SampleSource.open(self.manifest, self.data_root, self.seed)

    def first_positions(self, source: SampleSource, count: int) -> list[int]:
        """Return the positions of the samples that training meets first."""
        return self._sampler(source).order(epoch=0)[:count].tolist()

    def train_dataloader(self) -> StepLoader:
        """Return this rank's loader; its length is the epoch's number of micro-batches."""
        trainer: Any = self.trainer
        if self.dataset is None or trainer is None:
            raise ConfigError("the data module has no trainer; use Trainer.fit(..., datamodule=)")
        per_node = trainer.world_size // trainer.num_nodes
        accumulate = accumulation_steps(
            self.global_batch_size, self.micro_batch_size, per_node, trainer.num_nodes
        )
        if trainer.accumulate_grad_batches != accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; a global "
                f"batch of {self.global_batch_size} with micro-batches of {self.micro_batch_size} "
                f"on {trainer.world_size} ranks needs {accumulate}"
            )
        device: torch.device = trainer.strategy.root_device
        self._loader = StepLoader(
            self.dataset,
            self._sampler(
                self.dataset.source,
                accumulate=accumulate,
                world_size=trainer.world_size,
                rank=trainer.global_rank,
            ),
            pad_token_id=_pad_token_id(self.encoder),
            num_workers=self.num_workers,
            multiple_of=self.pad_to_multiple_of,
            all_reduce_sum=self._all_reduce_sum,
            pin_memory=device.type == "cuda",
        )
        return self._loader

    def teardown(self, stage: str) -> None:
        """End the loader's workers."""
        if self._loader is not None:
            self._loader.close()

    def _sampler(
        self, source: SampleSource, *, accumulate: int = 1, world_size: int = 1, rank: int = 0
    ) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            source.name,
            len(source),
            self.global_batch_size,
            seed=self.seed,
            accumulate=accumulate,
            world_size=world_size,
            rank=rank,
        )

    def _all_reduce_sum(self, value: int) -> int:
        strategy: Any = self.trainer.strategy  # pyright: ignore[reportOptionalMemberAccess]
        total = torch.tensor(value, dtype=torch.int64, device=strategy.root_device)
        return int(strategy.reduce(total, reduce_op="sum"))


def _pad_token_id(encoder: ConversationEncoder) -> int:
    """Return the tokenizer's padding id, or 0: padding has no label and is never attended to."""
    token: Any = getattr(encoder.tokenizer, "pad_token_id", None)
    return 0 if token is None or token == encoder.image_token_id else int(token)
