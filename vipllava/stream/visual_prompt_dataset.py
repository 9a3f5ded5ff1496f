"""The samples of a mix, finished: read, marked, encoded; by the policy with substitutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vipllava.stream.collate import EncodedSample
from vipllava.stream.order import Epoch, Item
from vipllava.stream.quarantine import BadSample, BadSamplePolicy, candidates, with_substitute
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import RecordError, Sample, VipLlavaError

_Made = TypeVar("_Made")


@dataclass(eq=False)
class VisualPromptDataset:
    """Finished samples of a mix."""

    sources: Sequence[SampleSource]  # the data sets, in the order of the mix
    sample_encoder: SampleEncoder  # makes samples
    policy: BadSamplePolicy = field(default_factory=BadSamplePolicy)  # what to do about bad ones

    def make(self, item: Item) -> EncodedSample:
        """Return one finished sample.

        Raises:
            RecordError: it is a bad one; names shard, key and remedy.
            StorageError: it cannot be read now.
        """
        return self._made(item, self.sample_encoder.encode)

    def load(self, item: Item, *, in_pack: bool = False) -> tuple[EncodedSample, BadSample | None]:
        """Return one finished sample, or by the policy a substitute.

        Args:
            item: the sample.
            in_pack: a substitute may not be longer than the sample, whose room it takes.

        Raises:
            RecordError: by the policy, or because no substitute is good either.
            StorageError: it cannot be read now.
            VipLlavaError: it was planned into a pack, and here not even its text can be read.
        """

        def make(other: Item) -> EncodedSample:
            if in_pack and other != item and (length := self._length(other)) > self._room(item):
                raise RecordError(f"{length} ids do not fit into the place of the sample")
            return self.make(other)

        made, _, fault = self._or_substitute(item, make)
        return made, fault

    def measure(self, item: Item) -> tuple[int, Item, BadSample | None]:
        """Return a sample's true length in ids, without decoding its image.

        Returns:
            The length, the item (a substitute by the policy) and what was wrong with the first.
        """
        return self._or_substitute(item, self._length)

    def estimate_lengths(self, epoch: Epoch) -> npt.NDArray[np.int32]:
        """Return the estimated total length of samples, text and image, int32 [samples]."""
        lengths = np.empty(len(epoch), dtype=np.int32)
        image = self.sample_encoder.conversation_encoder.image_seq_length
        for part, source in enumerate(self.sources):
            chosen = epoch.part == part
            positions = epoch.position[chosen]
            shards = source.shards
            lengths[chosen] = shards.text_tokens(positions) + image * shards.has_image(positions)
        return lengths

    def has_image(self, item: Item) -> bool:
        """Return whether a sample has an image."""
        return bool(self.sources[item.part].shards.has_image(np.array([item.position]))[0])

    def _room(self, item: Item) -> int:
        """Return the length that a sample was planned with; its text was good then."""
        try:
            return self._length(item)
        except RecordError as error:
            raise VipLlavaError(
                f"{error}\nIt was read when the packs were planned, on the machine of rank 0: this "
                "machine's copy of the data is damaged. Copy it again, and start again"
            ) from error

    def _length(self, item: Item) -> int:
        return self._made(item, self.sample_encoder.encode_text)[1].length

    def _made(self, item: Item, make: Callable[[Sample, int], _Made]) -> _Made:
        source = self.sources[item.part]
        sample = source.sample(item.position, item.epoch_pass)
        try:
            return make(sample, item.epoch_pass)
        except VipLlavaError as error:
            shard, _ = source.shards.locate(item.position)
            raise error.at(source.shards.paths[shard]) from error

    def _or_substitute(
        self, item: Item, make: Callable[[Item], _Made]
    ) -> tuple[_Made, Item, BadSample | None]:
        source, seed = self.sources[item.part], self.sample_encoder.seed
        others = candidates(item, len(source), seed=seed, name=source.name)
        return with_substitute(item, make, self._describe, self.policy, others)

    def _describe(self, item: Item, error: RecordError, substitute: Item) -> BadSample:
        shards = self.sources[item.part].shards
        shard, _ = shards.locate(item.position)
        return BadSample(
            dataset=shards.name,
            key=shards.key(item.position),
            shard=str(shards.paths[shard]),
            offset=shards.record_offset(item.position),
            epoch_pass=item.epoch_pass,
            fault=error.fault,
            reason=str(error),
            substitute=shards.key(substitute.position),
        )
