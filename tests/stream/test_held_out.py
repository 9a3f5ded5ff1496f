"""Held-out samples: each counts once, and all ranks run as many batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.toy_data import said, toy_samples
from tests.toy_stream import Build
from vipllava.stream.held_out import HeldOutLoader, divide
from vipllava.stream.ranks import Ranks
from vipllava.types import RecordError, VipLlavaError


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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_ranks_end_with_the_one_that_cannot_read_a_sample(
    build_dataset: Build, num_workers: int
) -> None:
    samples = toy_samples(6)
    samples[2] = ("s002", {"id": 2, "conversations": said("Hi")}, None, None)
    dataset = build_dataset(samples)
    told: list[tuple[list[int], str | None]] = []

    def make(ranks: Ranks) -> HeldOutLoader:
        return HeldOutLoader(
            dataset.sources[0],
            dataset.encoder,
            micro_batch_size=2,
            max_samples=None,
            rank=0,
            world_size=1,
            ranks=ranks,
            num_workers=num_workers,
            pad_token_id=0,
        )

    def note(mine: str | None) -> list[str | None]:
        told.append((failed, mine))
        return [mine]

    failed: list[int] = []
    here = Ranks(sum=lambda mine: (failed.extend(mine), list(mine))[1], gather=note)
    with pytest.raises(RecordError, match=r"^\S+shard-000000\.tar: toy/s002: field `conv"):
        list(make(here))
    assert failed == [0, 1]
    assert len(told) == 1
    elsewhere = Ranks(sum=lambda mine: [1], gather=lambda mine: [mine, "CacheError: silent"])
    with pytest.raises(VipLlavaError, match="rank 1: CacheError: silent"):
        list(make(elsewhere))
