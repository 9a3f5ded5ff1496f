"""Held-out samples: each counts once, and all ranks run as many batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.toy_data import said, toy_samples
from tests.toy_stream import Build
from vipllava.stream.batching import Cursor, SampleBatches
from vipllava.stream.datamodule import HeldOutLoader
from vipllava.stream.loader import StepSampler
from vipllava.stream.order import Part, SampleOrder
from vipllava.stream.ranks import Ranks
from vipllava.types import RecordError, VipLlavaError


def divide(count: int, rank: int, world_size: int, size: int) -> list[list[tuple[int, bool]]]:
    """Return a rank's batches: the positions, and whether each counts."""
    order = SampleOrder([Part("toy", (count,), count)], 0, shuffle=False)
    plan = SampleBatches(order, world_size * size)
    shares = map(StepSampler(plan, world_size=world_size, rank=rank).share, plan.batches(Cursor()))
    return [
        [(item.position, n < len(rows) - share.repeats[0]) for n, (item,) in enumerate(rows)]
        for share in shares
        for rows in share.micro_batches
    ]


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
        (0, [[(0, True), (2, True)], [(4, True)]]),
        (1, [[(1, True), (3, True)], [(4, False)]]),
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
            dataset.sample_encoder,
            dataset.sample_encoder.collator(),
            micro_batch_size=2,
            ranks=ranks,
            num_workers=num_workers,
        )

    def note(mine: str | None) -> list[str | None]:
        told.append((failed, mine))
        return [mine]

    failed: list[int] = []
    here = Ranks(sum=lambda mine: (failed.append(mine[-1]), list(mine))[1], gather=note)
    with pytest.raises(RecordError, match=r"^\S+shard-000000\.tar: toy/s002: field `conv"):
        list(make(here))
    assert failed == [0, 1]
    assert len(told) == 1
    elsewhere = Ranks(
        sum=lambda mine: [0, 0, 0, 1], gather=lambda mine: [mine, "CacheError: silent"]
    )
    with pytest.raises(VipLlavaError, match="rank 1: CacheError: silent"):
        list(make(elsewhere))


def test_every_pass_has_the_same_marks(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(5))
    encoder = dataset.sample_encoder
    loader = HeldOutLoader(
        dataset.sources[0], encoder, encoder.collator(), micro_batch_size=2, max_samples=3
    )
    first = list(loader)
    assert [batch.keys for batch in first] == [("toy/s000", "toy/s001"), ("toy/s002",)]
    for batch, again in zip(first, loader, strict=True):
        assert torch.equal(batch.pixel_values, again.pixel_values)
        assert torch.equal(batch.input_ids, again.input_ids)
