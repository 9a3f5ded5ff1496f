"""Encoded samples to a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Batch, Encoded


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


def collate_rows(
    samples: Sequence[EncodedSample],
    *,
    pad_token_id: int,
    image_size: int,
    multiple_of: int = 1,
) -> Batch:
    """Pad samples on the right to the longest, one sample a row.

    Padding is a segment of its own: its positions restart at 0, which is all transformers needs
    to keep it away from the sample. Padding ids carry no label.

    Args:
        samples: at least one.
        pad_token_id: id of padding; any id but the image's.
        image_size: side of the pictures, pixels; shapes ``pixel_values`` where there is none.
        multiple_of: the row length is rounded up to a multiple of this.

    Returns:
        A batch whose ``pixel_values`` are in row order; ``num_supervised_global`` is still 0.
    """
    longest = max(len(sample.encoded.input_ids) for sample in samples)
    shape = len(samples), -(-longest // multiple_of) * multiple_of
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    position_ids = torch.empty(shape, dtype=torch.int64)
    segment_ids = torch.full(shape, PADDING_SEGMENT, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.encoded.input_ids)
        input_ids[row, :length] = torch.as_tensor(sample.encoded.input_ids)
        labels[row, :length] = torch.as_tensor(sample.encoded.labels)
        position_ids[row, :length] = torch.arange(length)
        position_ids[row, length:] = torch.arange(shape[1] - length)
        segment_ids[row, :length] = 0
    pictures = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    pixel_values = (
        torch.stack(pictures)
        if pictures
        else torch.empty((0, 3, image_size, image_size), dtype=torch.uint8)
    )
    return Batch(
        input_ids,
        labels,
        position_ids,
        segment_ids,
        pixel_values,
        keys=tuple(sample.key for sample in samples),
    )
