"""Encoded samples to a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import default_collate  # pyright: ignore[reportUnknownVariableType]

from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Batch, Encoded, RecordError


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample ready for a batch."""

    key: str  # ``dataset/key``
    encoded: Encoded  # ids and labels
    pixel_values: torch.Tensor | None  # uint8 [3, size, size], or None for a text-only sample
    dataset: str = ""  # name of its data set

    def without_labels(self) -> EncodedSample:
        """Return the sample as one that counts for no loss."""
        labels = np.full_like(self.encoded.labels, IGNORE_INDEX)
        return replace(self, encoded=replace(self.encoded, labels=labels))


@dataclass(frozen=True, slots=True)
class Collator:
    """Puts samples side by side in rows and pads the rows on the right.

    Positions restart with every sample, and padding is a sample of its own: that is all
    transformers needs to keep them apart. Padding ids carry no label.
    """

    pad_token_id: int  # id of padding; any id but the image's
    image_size: int  # side of the images, pixels; shapes ``pixel_values`` if there are no images
    multiple_of: int = 1  # the row length is rounded up to a multiple of this
    # Row length, for shapes that never change; None takes the longest row's.
    pack_length: int | None = None

    def __call__(self, packs: Sequence[Sequence[EncodedSample]]) -> Batch:
        """Return a batch of rows, given the samples of each, at least one a row.

        Raises:
            RecordError: a row is longer than ``pack_length``; names its samples.
        """
        lengths = [sum(sample.encoded.length for sample in pack) for pack in packs]
        width = self.pack_length or -(-max(lengths) // self.multiple_of) * self.multiple_of
        for pack, length in zip(packs, lengths, strict=True):
            if length > width:
                raise RecordError(
                    f"{', '.join(sample.key for sample in pack)}: {length} ids do not fit into a "
                    f"row of {width}",
                    "too-long",
                )
        # One block for the four: it goes from worker to trainer as one piece of shared memory.
        columns = np.empty((4, len(packs), width), dtype=np.int64)
        input_ids, labels, position_ids, segment_ids = columns
        input_ids[:], labels[:], segment_ids[:] = self.pad_token_id, IGNORE_INDEX, PADDING_SEGMENT
        positions = np.arange(width)
        for row, pack in enumerate(packs):
            start = 0
            for segment, sample in enumerate(pack):
                end = start + sample.encoded.length
                input_ids[row, start:end] = sample.encoded.input_ids
                labels[row, start:end] = sample.encoded.labels
                position_ids[row, start:end] = positions[: end - start]
                segment_ids[row, start:end] = segment
                start = end
            position_ids[row, start:] = positions[: width - start]
        samples = [sample for pack in packs for sample in pack]
        images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        pixel_values = (
            default_collate(images)  # in a worker straight into shared memory: saves a copy
            if images
            else torch.empty((0, 3, self.image_size, self.image_size), dtype=torch.uint8)
        )
        block = torch.as_tensor(columns)
        parts = block[0], block[1], block[2], block[3]
        return Batch(
            *parts,
            pixel_values,
            keys=tuple(sample.key for sample in samples),
            datasets=tuple(sample.dataset for sample in samples),
        )
