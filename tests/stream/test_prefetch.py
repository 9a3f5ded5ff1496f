"""Remote shards are asked for in the order in which training reaches them, and not too often."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from vipllava.shards.tars import ShardSet
from vipllava.stream.order import Part, SampleOrder
from vipllava.stream.prefetch import ShardPrefetcher
from vipllava.types import ConfigError

SHARDS, SIZE = 12, 10


class FakeCache:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes


class FakeShards:
    """As much of a shard set as the prefetcher looks at."""

    def __init__(self, name: str, cache: FakeCache | None) -> None:
        self.name = name
        self.cache = cache
        self.paths = tuple(range(SHARDS))
        self.shard_sizes = (SIZE,) * SHARDS
        self.shard_ends = np.arange(1, SHARDS + 1) * SIZE
        self.tar_sizes = np.full(SHARDS, 1000)
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return SHARDS * SIZE

    def prefetch(self, shards: Any) -> None:
        self.asked.append(list(shards))


def make(window: int, *caches: FakeCache | None) -> tuple[list[FakeShards], SampleOrder]:
    sets = [FakeShards(f"s{number}", cache) for number, cache in enumerate(caches)]
    parts = [Part(s.name, s.shard_sizes, len(s)) for s in sets]
    return sets, SampleOrder(parts, seed=1, window_samples=window)


def prefetcher(sets: list[FakeShards], order: SampleOrder) -> ShardPrefetcher:
    return ShardPrefetcher(cast("list[ShardSet]", sets), order)


def test_every_shard_is_asked_for_before_it_is_read() -> None:
    sets, order = make(30, FakeCache(10**6))
    fetch = prefetcher(sets, order)
    epoch = order.epoch(0)
    asked: set[int] = set()
    for sample in range(len(order)):
        fetch.consumed(0, sample)
        asked = {shard for batch in sets[0].asked for shard in batch}
        assert int(epoch.position[sample]) // SIZE in asked
    assert asked == set(range(SHARDS))
    assert len(sets[0].asked) == 120 / 15
    first = dict.fromkeys((epoch.position[:30] // SIZE).tolist())
    assert sets[0].asked[0] == list(first)


def test_another_epoch_and_a_resumed_one_start_at_their_place() -> None:
    sets, order = make(30, FakeCache(10**6))
    fetch = prefetcher(sets, order)
    fetch.consumed(0, 60)
    fetch.consumed(1, 0)
    expected = [order.epoch(0).position[60:90], order.epoch(1).position[:30]]
    assert sets[0].asked == [list(dict.fromkeys((p // SIZE).tolist())) for p in expected]


def test_local_data_sets_of_a_mix_are_left_alone() -> None:
    sets, order = make(30, None, FakeCache(10**6))
    prefetcher(sets, order).consumed(0, 0)
    assert sets[0].asked == []
    assert len(sets[1].asked) == 1


def test_a_cache_that_cannot_hold_a_window_is_refused() -> None:
    sets, order = make(45, FakeCache(4999))
    message = r"cache_gb=4.999e-06 is less than the 5e-06 GB of the 5 shards of `s0` .* raise it"
    with pytest.raises(ConfigError, match=message):
        prefetcher(sets, order)
    sets, order = make(45, FakeCache(5000))
    prefetcher(sets, order)
