"""Held-out samples for the loss between training steps: always the same, in the same order.

They are a stream as training has it, without shuffling and without substitutes.
"""

from __future__ import annotations

from collections.abc import Iterator

from vipllava.stream.batching import SampleBatches
from vipllava.stream.collate import Collator
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import Part, SampleOrder
from vipllava.stream.ranks import Ranks
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import Batch


class HeldOutLoader:
    """One rank's batches of the first samples of a data set.

    Marks and wordings are those of epoch 0 in every pass. A sample that cannot be read is an
    error, on every rank: evaluation never substitutes.

    Args:
        source: the data set.
        sample_encoder: makes ids and images.
        collator: makes the rows.
        micro_batch_size: samples per forward pass.
        max_samples: only the first so many; None: all.
        rank: of this process.
        world_size: number of processes.
        ranks: the processes, to end together.
        num_workers: loader processes; they end with each pass.
    """

    def __init__(
        self,
        source: SampleSource,
        sample_encoder: SampleEncoder,
        collator: Collator,
        *,
        micro_batch_size: int,
        max_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        ranks: Ranks | None = None,
        num_workers: int = 0,
    ) -> None:
        self.num_samples = len(source) if max_samples is None else min(max_samples, len(source))
        part = Part(source.name, tuple(source.shards.shard_sizes), self.num_samples)
        order = SampleOrder([part], sample_encoder.seed, shuffle=False)
        plan = SampleBatches(order, world_size * micro_batch_size)
        # Lightning does not see its sampler, whose epoch it would set.
        self._steps = StepLoader(
            VisualPromptDataset([source], sample_encoder),
            StepSampler(plan, world_size=world_size, rank=rank),
            collator,
            num_workers=num_workers,
            persistent_workers=False,
            ranks=ranks,
        )

    def __len__(self) -> int:
        """Return the number of batches; the same on every rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._steps)
