"""The stream of training: global batches in a fixed order, divided over ranks by position.

The sequence of global batches is a pure function of (seed, epoch). Ranks and accumulation only
divide it: slot ``p`` of a global batch goes to rank ``p % world_size``, and a rank's slots are cut
into ``accumulate`` micro-batches. The loader's unit is one rank's share of one optimizer step,
because the loss's denominator, the supervised tokens of the whole global batch, must be known
before the first backward pass of the step.

The remainder of an epoch is one last, smaller global batch of ``R`` samples. It has as many
micro-batches on every rank as any other (DeepSpeed counts them), so where ``R`` does not divide,
or is smaller than ranks x micro-batches, samples of the same batch are repeated with every label
ignored: each sample is learnt from exactly once per epoch, and no micro-batch is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vipllava.data.collate import EncodedSample, collate_rows
from vipllava.data.samples import SampleEncoder, SampleSource
from vipllava.keyed_random import generator_for
from vipllava.types import IGNORE_INDEX, Batch, CheckpointError, ConfigError, VipLlavaError

STATE_VERSION: Final = 1
REPEAT_SUFFIX: Final = "#repeat"
"""Ends the key of a repeated sample without labels in an epoch's last batch."""

Positions = npt.NDArray[np.int64]


class VisualPromptDataset(Dataset[EncodedSample]):
    """Finished samples by (epoch, position)."""

    def __init__(self, source: SampleSource, encoder: SampleEncoder) -> None:
        self.source = source
        self.encoder = encoder

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> EncodedSample:
        """Return the sample at ``(epoch, position)``; raises what its making raises."""
        epoch, position = index
        sample = self.source.sample(position, epoch)
        try:
            return self.encoder.encode(sample, epoch)
        except VipLlavaError as error:
            shard, _ = self.source.shards.locate(position)
            raise error.at(self.source.shards.paths[shard]) from error


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a micro-batch; a ``repeat`` carries no labels."""

    position: int
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class StepShare:
    """One rank's part of one optimizer step, still as positions."""

    epoch: int
    micro_batches: tuple[tuple[Slot, ...], ...]


class GlobalBatchSampler(Sampler[StepShare]):
    """Order of an epoch's samples, and this rank's share of every step.

    Args:
        name: the data set's name, part of the random key.
        num_samples: samples of an epoch.
        global_batch_size: samples of one optimizer step over all ranks.
        seed: of the order.
        accumulate: micro-batches per rank and step.
        world_size: number of ranks.
        rank: this process.
        shuffle: False keeps shard order.

    Raises:
        ConfigError: the global batch does not divide by ranks and micro-batches.
    """

    def __init__(
        self,
        name: str,
        num_samples: int,
        global_batch_size: int,
        *,
        seed: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        shuffle: bool = True,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % (accumulate * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} does not divide by accumulate={accumulate} "
                f"x world_size={world_size}"
            )
        self.name = name
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.shuffle = shuffle
        self.epoch = 0
        self.start_step = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (Lightning calls this)."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return -(-self.num_samples // self.global_batch_size)

    def order(self, epoch: int) -> Positions:
        """Return the positions of an epoch in order, int64 [num_samples]."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        return generator_for(self.seed, epoch, self.name, "order").permutation(self.num_samples)

    def global_batches(self, epoch: int) -> Iterator[Positions]:
        """Yield the positions of each global batch; the last may be smaller."""
        order = self.order(epoch)
        for start in range(0, self.num_samples, self.global_batch_size):
            yield order[start : start + self.global_batch_size]

    def share(self, batch: Positions, epoch: int) -> StepShare:
        """Return this rank's part of a global batch."""
        per_rank = max(-(-len(batch) // self.world_size), self.accumulate)
        slots = [
            Slot(int(batch[place % len(batch)]), place >= len(batch))
            for place in range(self.rank, per_rank * self.world_size, self.world_size)
        ]
        # Sizes differ by at most one; equal in every full batch.
        cuts = [per_rank * number // self.accumulate for number in range(self.accumulate + 1)]
        parts = (tuple(slots[a:b]) for a, b in pairwise(cuts))
        return StepShare(epoch, tuple(parts))

    def __iter__(self) -> Iterator[StepShare]:
        """Yield this rank's shares of the epoch, from ``start_step`` on."""
        epoch, start = self.epoch, self.start_step
        for step, batch in enumerate(self.global_batches(epoch)):
            if step >= start:
                yield self.share(batch, epoch)


class _StepDataset(Dataset[Any]):
    """A rank's share of a step to its micro-batches; runs in the workers."""

    def __init__(
        self, dataset: VisualPromptDataset, pad_token_id: int, image_size: int, multiple_of: int
    ) -> None:
        self.dataset = dataset
        self.pad_token_id = pad_token_id
        self.image_size = image_size
        self.multiple_of = multiple_of

    def __getitem__(self, share: StepShare) -> list[Batch] | VipLlavaError:
        try:
            return [
                collate_rows(
                    [self._sample(share.epoch, slot) for slot in slots],
                    pad_token_id=self.pad_token_id,
                    image_size=self.image_size,
                    multiple_of=self.multiple_of,
                )
                for slots in share.micro_batches
            ]
        except VipLlavaError as error:  # a value: torch would wrap it into a traceback's text
            return error

    def _sample(self, epoch: int, slot: Slot) -> EncodedSample:
        sample = self.dataset[epoch, slot.position]
        if not slot.repeat:
            return sample
        ignored = np.full_like(sample.encoded.labels, IGNORE_INDEX)
        encoded = replace(sample.encoded, labels=ignored)
        return replace(sample, key=sample.key + REPEAT_SUFFIX, encoded=encoded)


def _alone(value: int) -> int:
    return value


def _as_it_is(value: Any) -> Any:
    return value


class StepLoader:
    """Micro-batches in order, each stamped with the global batch's supervised tokens.

    Has a length, so Lightning fetches nothing ahead and ``state_dict`` counts what was consumed.
    The number of workers never changes what comes out.

    Args:
        dataset: finished samples.
        sampler: order and division.
        pad_token_id: id of padding.
        num_workers: processes that make samples; torch gives each one thread. 0 makes them here.
        multiple_of: row lengths are rounded up to a multiple of this.
        all_reduce_sum: sums a number over all ranks; called once per step, by every rank.
        pin_memory: pin batches for the copy to a GPU.
        prefetch_factor: shares in the making per worker.
    """

    def __init__(
        self,
        dataset: VisualPromptDataset,
        sampler: GlobalBatchSampler,
        *,
        pad_token_id: int,
        num_workers: int = 0,
        multiple_of: int = 1,
        all_reduce_sum: Callable[[int], int] = _alone,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.all_reduce_sum = all_reduce_sum
        image_size = dataset.encoder.transform.size
        self._loader: DataLoader[Any] = DataLoader(
            _StepDataset(dataset, pad_token_id, image_size, multiple_of),
            sampler=sampler,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            # Its own generator: the loader would else draw from the global one on every epoch.
            generator=torch.Generator().manual_seed(0),
        )
        self._progress = (0, 0)  # epoch, micro-batches of it that were handed out
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the micro-batches of a whole epoch on this rank."""
        return len(self.sampler) * self.sampler.accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Yield the epoch's micro-batches; after ``load_state_dict``, those not yet consumed.

        Raises:
            VipLlavaError: the first bad sample, with shard, key and remedy.
        """
        epoch, consumed = self.sampler.epoch, 0
        if self._resume is not None and self._resume[0] == epoch:
            consumed = self._resume[1]
        self._resume = None
        self._progress = (epoch, consumed)
        self.sampler.start_step, offset = divmod(consumed, self.sampler.accumulate)
        for batches in self._loader:
            if isinstance(batches, VipLlavaError):
                try:
                    raise batches
                finally:
                    del batches  # error and frame would hold each other, and the workers with them
            total = self.all_reduce_sum(sum(batch.num_supervised for batch in batches))
            for batch in batches[offset:]:
                batch.num_supervised_global = total
                consumed += 1
                self._progress = (epoch, consumed)
                yield batch
            offset = 0

    def close(self) -> None:
        """End the workers; the next iteration starts new ones.

        Left to the garbage collector, which meets trainer, loader and queues as one cycle in any
        order, this takes five seconds of waiting.
        """
        # torch has no public way; Lightning does the same to the loaders it knows.
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            setattr(self._loader, "_iterator", None)  # noqa: B010 - private to torch's type

    def state_dict(self) -> dict[str, Any]:
        """Return what has been consumed, and of which data."""
        epoch, consumed = self._resume or self._progress
        if epoch != self.sampler.epoch:  # the next epoch was announced and has not begun
            epoch, consumed = self.sampler.epoch, 0
        step, micro_batch = divmod(consumed, self.sampler.accumulate)
        return {
            "version": STATE_VERSION,
            **self._identity(),
            "epoch": epoch,
            "step": step,
            "micro_batch": micro_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind ``state`` at the next iteration of its epoch.

        Raises:
            CheckpointError: the state is of other data, another order or another version, or
                stands within a step; names each difference.
        """
        expected = {"version": STATE_VERSION, **self._identity()}
        different = [
            f"{name}: saved {state.get(name)!r}, now {value!r}"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        if different:
            raise CheckpointError(
                "the data of this run is not that of the checkpoint; resume with the same data, "
                "seed and global batch, or start anew:\n- " + "\n- ".join(different)
            )
        micro_batch = int(state["micro_batch"])
        if micro_batch >= self.sampler.accumulate:
            raise CheckpointError(
                f"the checkpoint stands {micro_batch} micro-batches into an optimizer step, this "
                f"run has {self.sampler.accumulate} per step; resume with the same ranks and "
                "micro-batch, or from a checkpoint at the end of a step"
            )
        epoch = int(state["epoch"])
        self.sampler.set_epoch(epoch)
        self._resume = (epoch, int(state["step"]) * self.sampler.accumulate + micro_batch)

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        return {
            "dataset": sampler.name,
            "fingerprint": self.dataset.source.shards.fingerprint,
            "num_samples": sampler.num_samples,
            "global_batch_size": sampler.global_batch_size,
            "seed": sampler.seed,
        }
