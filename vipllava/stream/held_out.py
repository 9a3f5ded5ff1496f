"""Held-out samples for the loss between training steps: always the same, in the same order.

Every rank runs the same number of batches, as sharded networks need: where the samples do not
divide, the last one comes again without labels and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vipllava.processes import signals_held, start_worker
from vipllava.stream.collate import EncodedSample, collate_packs
from vipllava.stream.ranks import Ranks
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import IGNORE_INDEX, Batch, VipLlavaError


class HeldOutLoader:
    """One rank's batches of the first samples of a data set.

    Marks and wordings are those of epoch 0 in every pass. A sample that cannot be read is an
    error: evaluation never substitutes.

    Args:
        source: the data set.
        samples: makes ids and pictures.
        micro_batch_size: samples per forward pass.
        max_samples: only the first so many; None: all.
        rank: of this process.
        world_size: number of processes.
        ranks: the processes, to end together.
        num_workers: loader processes.
        pad_token_id: id of padding.
        multiple_of: row lengths are rounded up to a multiple of this.
    """

    def __init__(
        self,
        source: SampleSource,
        samples: SampleEncoder,
        *,
        micro_batch_size: int,
        max_samples: int | None,
        rank: int,
        world_size: int,
        ranks: Ranks | None = None,
        num_workers: int,
        pad_token_id: int,
        multiple_of: int = 1,
    ) -> None:
        count = len(source) if max_samples is None else min(max_samples, len(source))
        shares = divide(count, rank, world_size, micro_batch_size)
        dataset = _HeldOut(source, samples, shares, pad_token_id, multiple_of)
        self.ranks = ranks or Ranks()
        make: Any = DataLoader
        self._loader = make(
            dataset, batch_size=None, num_workers=num_workers, worker_init_fn=start_worker
        )
        self.num_samples = count

    def __len__(self) -> int:
        """Return the number of batches; the same on every rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order.

        Raises:
            VipLlavaError: a sample cannot be read or made; on every rank, so that none waits.
        """
        batches: Iterator[Batch | VipLlavaError] | None = None
        for _ in range(len(self)):
            try:
                if batches is None:
                    with signals_held():
                        batches = iter(self._loader)
                made: Batch | Exception = next(batches)
            except Exception as error:  # noqa: BLE001 - told to the others, then raised
                made = error
            error = made if isinstance(made, Exception) else None
            if self.ranks.sum([int(error is not None)])[0]:
                batches = None  # its workers end now, not when the error is forgotten
                self.ranks.end_together(error)
            if isinstance(made, Batch):
                yield made


def divide(
    count: int, rank: int, world_size: int, micro_batch_size: int
) -> list[list[tuple[int, bool]]]:
    """Deal samples out to ranks, batch by batch.

    Returns:
        This rank's batches: positions, and whether each counts. All ranks get as many batches.
    """
    at_once = world_size * micro_batch_size
    num_batches = -(-count // at_once)
    batches: list[list[tuple[int, bool]]] = []
    for batch in range(num_batches):
        first = batch * at_once + rank * micro_batch_size
        places = range(first, first + micro_batch_size)
        counted = [(place, True) for place in places if place < count]
        batches.append(counted or [(count - 1, False)])
    return batches


class _HeldOut(Dataset[Any]):
    def __init__(
        self,
        source: SampleSource,
        samples: SampleEncoder,
        batches: Sequence[Sequence[tuple[int, bool]]],
        pad_token_id: int,
        multiple_of: int,
    ) -> None:
        self.source = source
        self.samples = samples
        self.batches = batches
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch | VipLlavaError:
        try:
            return collate_packs(
                [[self._sample(position, counts)] for position, counts in self.batches[index]],
                pad_token_id=self.pad_token_id,
                image_size=self.samples.transform.size,
                multiple_of=self.multiple_of,
            )
        except VipLlavaError as error:
            return error  # torch would rewrite one that is raised

    def _sample(self, position: int, counts: bool) -> EncodedSample:
        sample = self.samples.encode(self.source.sample(position))
        if counts:
            return sample
        labels = np.full_like(sample.encoded.labels, IGNORE_INDEX)
        return replace(sample, encoded=replace(sample.encoded, labels=labels))
