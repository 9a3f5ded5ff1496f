"""Rows of one sample and of several, in numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vipllava.stream.collate import Collator, EncodedSample
from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Encoded, RecordError


def sample(key: str, ids: list[int], num_labels: int, image: int | None) -> EncodedSample:
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.where(np.arange(len(ids)) >= len(ids) - num_labels, input_ids, IGNORE_INDEX)
    pixels = None if image is None else torch.full((3, 2, 2), image, dtype=torch.uint8)
    return EncodedSample(key, Encoded(input_ids, labels, int(image is not None)), pixels)


A = sample("d/a", [5, 6, 7], 1, 9)
B = sample("d/b", [8, 9], 1, None)
C = sample("d/c", [4], 1, 3)
D = sample("d/d", [2, 3], 2, 200)
X, P = IGNORE_INDEX, PADDING_SEGMENT


def test_rows_of_one_sample_are_padded_on_the_right() -> None:
    batch = Collator(pad_token_id=1, image_size=2)([[A], [B]])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.labels.tolist() == [[X, X, 7], [X, 9, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0], [0, 0, P]]
    assert batch.pixel_values.tolist() == [[[[9, 9], [9, 9]]] * 3]
    assert batch.keys == ("d/a", "d/b")
    assert (batch.num_supervised, batch.num_supervised_global) == (2, 0)


def test_packs_restart_positions_and_count_segments() -> None:
    batch = Collator(pad_token_id=0, image_size=2)([[C, B, A], [D]])
    assert batch.input_ids.tolist() == [[4, 8, 9, 5, 6, 7], [2, 3, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[4, X, 9, X, X, 7], [2, 3, X, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert batch.segment_ids.tolist() == [[0, 1, 1, 2, 2, 2], [0, 0, P, P, P, P]]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [3, 9, 200]
    assert batch.keys == ("d/c", "d/b", "d/a", "d/d")
    for column in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids):
        assert column.dtype == torch.int64


@pytest.mark.parametrize(
    ("lengths", "width"),
    [({}, 6), ({"multiple_of": 4}, 8), ({"multiple_of": 6}, 6), ({"pack_length": 9}, 9)],
)
def test_row_lengths(lengths: dict[str, int], width: int) -> None:
    batch = Collator(pad_token_id=0, image_size=2, **lengths)([[A, B, C], [D]])
    assert batch.input_ids.shape == (2, width)
    assert batch.position_ids[1].tolist() == [0, 1, *range(width - 2)]
    assert batch.segment_ids[0].tolist() == [0, 0, 0, 1, 1, 2] + [P] * (width - 6)


def test_a_pack_that_fills_its_row_has_no_padding() -> None:
    batch = Collator(pad_token_id=0, image_size=2, pack_length=6)([[A, B, C]])
    assert P not in batch.segment_ids


def test_a_batch_without_pictures_keeps_their_shape() -> None:
    batch = Collator(pad_token_id=0, image_size=28)([[B, B]])
    assert batch.pixel_values.shape == (0, 3, 28, 28)
    assert batch.pixel_values.dtype == torch.uint8


def test_a_row_that_is_too_long_names_its_samples() -> None:
    with pytest.raises(RecordError, match=r"d/a, d/b: 5 ids do not fit .* of 4") as error:
        Collator(pad_token_id=0, image_size=2, pack_length=4)([[C], [A, B]])
    assert error.value.fault == "too-long"
