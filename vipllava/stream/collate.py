"""Encoded samples to a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import default_collate  # pyright: ignore[reportUnknownVariableType]

from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Batch, Encoded, RecordError


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample ready for a batch.

    Attributes:
        key: ``dataset/key``.
        encoded: ids and labels.
        pixel_values: uint8 [3, size, size], or None for a text-only sample.
    """

    key: str
    encoded: Encoded
    pixel_values: torch.Tensor | None


def collate_packs(
    packs: Sequence[Sequence[EncodedSample]],
    *,
    pad_token_id: int,
    image_size: int,
    multiple_of: int = 1,
    pack_length: int | None = None,
) -> Batch:
    """Put samples side by side in rows and pad the rows on the right.

    Positions restart with every sample, and padding is a sample of its own: that is all
    transformers needs to keep them apart. Padding ids carry no label.

    Args:
        packs: the samples of each row, at least one a row.
        pad_token_id: id of padding; any id but the image's.
        image_size: side of the pictures, pixels; shapes ``pixel_values`` where there is none.
        multiple_of: the row length is rounded up to a multiple of this.
        pack_length: row length, for shapes that never change; None takes the longest row's.

    Returns:
        A batch whose ``pixel_values`` are in row order; ``num_supervised_global`` is still 0.

    Raises:
        RecordError: a row is longer than ``pack_length``; names its samples.
    """
    lengths = [sum(sample.encoded.length for sample in pack) for pack in packs]
    width = pack_length or -(-max(lengths) // multiple_of) * multiple_of
    for pack, length in zip(packs, lengths, strict=True):
        if length > width:
            keys = ", ".join(sample.key for sample in pack)
            raise RecordError(f"{keys}: {length} ids do not fit into a row of {width}", "too-long")
    # One block for the four: it goes from worker to trainer as one piece of shared memory.
    columns = np.empty((4, len(packs), width), dtype=np.int64)
    input_ids, labels, position_ids, segment_ids = columns
    input_ids[:], labels[:], segment_ids[:] = pad_token_id, IGNORE_INDEX, PADDING_SEGMENT
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
    pictures = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    pixel_values = (
        default_collate(pictures)  # in a worker straight into shared memory: saves a copy
        if pictures
        else torch.empty((0, 3, image_size, image_size), dtype=torch.uint8)
    )
    block = torch.as_tensor(columns)
    return Batch(
        block[0],
        block[1],
        block[2],
        block[3],
        pixel_values,
        keys=tuple(sample.key for sample in samples),
    )
