"""Held-out samples: each counts once, and all ranks run as many batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vipllava.data.held_out import divide


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 7))
def test_every_sample_counts_once(count: int, world_size: int, size: int) -> None:
    shares = [divide(count, rank, world_size, size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    counted = [place for share in shares for batch in share for place, counts in batch if counts]
    assert sorted(counted) == list(range(count))
    for share in shares:
        for batch in share:
            assert 1 <= len(batch) <= size
            assert all(place < count for place, _ in batch)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [[(0, True), (1, True)], [(4, True)]]),
        (1, [[(2, True), (3, True)], [(4, False)]]),
    ],
)
def test_a_rank_without_a_sample_repeats_one(rank: int, expected: list) -> None:
    assert divide(5, rank, 2, 2) == expected
