from __future__ import annotations

import numpy as np
import torch

from vipllava.data.collate import EncodedSample, collate_rows
from vipllava.types import IGNORE_INDEX, Encoded


def sample(key: str, ids: list[int], num_labels: int, image: int | None) -> EncodedSample:
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.where(np.arange(len(ids)) >= len(ids) - num_labels, input_ids, IGNORE_INDEX)
    pixels = None if image is None else torch.full((3, 2, 2), image, dtype=torch.uint8)
    return EncodedSample(key, Encoded(input_ids, labels, int(image is not None)), pixels)


def test_rows_are_padded_on_the_right() -> None:
    samples = [sample("d/a", [5, 6, 7], 1, 9), sample("d/b", [8], 1, None)]
    batch = collate_rows(samples, pad_token_id=1, image_size=2)
    ignore = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch.labels.tolist() == [[ignore, ignore, 7], [8, ignore, ignore]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch.segment_ids.tolist() == [[0, 0, 0], [0, -1, -1]]
    assert batch.pixel_values.tolist() == [[[[9, 9], [9, 9]]] * 3]
    assert batch.keys == ("d/a", "d/b")
    assert (batch.num_supervised, batch.num_supervised_global) == (2, 0)


def test_lengths_round_up() -> None:
    batch = collate_rows(
        [sample("a", [5, 6, 7], 1, 1)], pad_token_id=0, image_size=2, multiple_of=4
    )
    assert batch.input_ids.shape == (1, 4)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0]]


def test_a_batch_without_pictures_keeps_their_shape() -> None:
    batch = collate_rows([sample("a", [5], 1, None)], pad_token_id=0, image_size=28)
    assert batch.pixel_values.shape == (0, 3, 28, 28)
    assert batch.pixel_values.dtype == torch.uint8
