"""Global batches: every sample once, exact continuation from any cursor, lengths kept together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from vipllava.stream.batching import (
    GROUP_WINDOW_BATCHES,
    BatchPlan,
    Cursor,
    GlobalBatch,
    PackedBatches,
    Row,
    SampleBatches,
)
from vipllava.stream.order import Epoch, Item, Part, SampleOrder
from vipllava.types import ConfigError

ORDER = SampleOrder([Part("toy", (60, 50, 40), 150)], 7, window_samples=64)


def lengths(epoch: Epoch) -> np.ndarray:
    """Between 1 and 97, unrelated to the order."""
    return (1 + epoch.position * 53 % 97).astype(np.int32)


class PairPlanner:
    """Packs of one, two and three samples in turn; notes which windows it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(
        self, items: Sequence[Item], rng: np.random.Generator, name: str
    ) -> tuple[Row, ...]:
        self.names.append(name)
        rows: list[Row] = []
        at = 0
        while at < len(items):
            size = 1 + len(rows) % 3
            rows.append(tuple(items[at : at + size]))
            at += size
        return tuple(rows[place] for place in rng.permutation(len(rows)))


def packed(planner: PairPlanner | None = None) -> PackedBatches:
    return PackedBatches(ORDER, 4, planner or PairPlanner(), window_samples=32)


def plans() -> dict[str, BatchPlan]:
    return {
        "shuffled": SampleBatches(ORDER, 8),
        "length_grouped": SampleBatches(ORDER, 8, lengths),
        "packed": packed(),
    }


def collect(plan: BatchPlan, start: Cursor) -> list[GlobalBatch]:
    return list(plan.batches(start))


@pytest.mark.parametrize("name", plans())
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sample_once_and_full_batches(name: str, epoch: int):
    plan = plans()[name]
    batches = collect(plan, Cursor(epoch))
    seen = Counter(item.position for batch in batches for row in batch.rows for item in row)
    assert seen == Counter(range(150))
    assert all(len(batch.rows) == plan.rows_per_batch for batch in batches[:-1])
    assert 1 <= len(batches[-1].rows) <= plan.rows_per_batch
    assert len(batches) <= plan.max_steps()
    assert not plan.exact or len(batches) == plan.max_steps()
    counts = np.cumsum([sum(map(len, batch.rows)) for batch in batches])
    assert [batch.after.samples for batch in batches] == counts.tolist()
    assert [batch.progress for batch in batches] == pytest.approx((counts / 150).tolist())
    assert [batch.after.step for batch in batches] == list(range(1, len(batches) + 1))
    assert collect(plan, batches[-1].after) == []


@pytest.mark.parametrize("name", plans())
def test_any_cursor_goes_on_exactly_behind_its_batch(name: str):
    whole = collect(plans()[name], Cursor(2))
    for number, batch in enumerate(whole):
        assert collect(plans()[name], batch.after) == whole[number + 1 :]


@pytest.mark.parametrize("name", plans())
def test_epochs_differ(name: str):
    first, second = (collect(plans()[name], Cursor(epoch)) for epoch in (0, 1))
    assert [batch.rows for batch in first] != [batch.rows for batch in second]


def test_grouping_leaves_little_to_pad():
    order = SampleOrder([Part("toy", (1000,), 1000)], 7)

    def padded(plan: SampleBatches) -> float:
        waste = total = 0
        for batch in plan.batches(Cursor()):
            sizes = [1 + item.position * 53 % 97 for (item,) in batch.rows]
            waste += max(sizes) * len(sizes) - sum(sizes)
            total += max(sizes) * len(sizes)
        return waste / total

    assert padded(SampleBatches(order, 8)) > 0.35
    assert padded(SampleBatches(order, 8, lengths)) < 0.06


def test_the_longest_batch_comes_first_and_the_rest_is_shuffled():
    plan = SampleBatches(ORDER, 8, lengths)
    means = [
        np.mean([1 + item.position * 53 % 97 for (item,) in batch.rows])
        for batch in plan.batches(Cursor())
    ]
    assert means[0] == max(means)
    assert means != sorted(means, reverse=True)


def test_grouping_works_in_windows_of_batches():
    size = 2
    order = SampleOrder([Part("toy", (400,), 400)], 7)
    window = size * GROUP_WINDOW_BATCHES
    plain = order.epoch(0).position
    grouped = [
        item.position
        for batch in SampleBatches(order, size, lengths).batches(Cursor())
        for (item,) in batch.rows
    ]
    for first in range(0, 400, window):
        assert sorted(grouped[first : first + window]) == sorted(plain[first : first + window])


def test_a_packed_cursor_plans_only_from_its_window_on():
    whole = collect(packed(), Cursor())
    third = next(batch for batch in whole if batch.after.window == 3)
    planner = PairPlanner()
    collect(packed(planner), third.after)
    assert planner.names[0] == "epoch0-window3"
    assert sorted(planner.names) == ["epoch0-window3", "epoch0-window4"]


def test_an_abandoned_iteration_ends_its_planner():
    planner = PairPlanner()
    batches = packed(planner).batches(Cursor())
    next(batches)
    batches.close()
    assert set(planner.names) <= {"epoch0-window0", "epoch0-window1"}


def test_an_error_of_the_planner_is_the_readers():
    class Broken(PairPlanner):
        def __call__(self, items, rng, name):
            if name.endswith("window1"):
                raise ConfigError("no plan")
            return super().__call__(items, rng, name)

    with pytest.raises(ConfigError, match="no plan"):
        collect(packed(Broken()), Cursor())


def test_impossible_sizes():
    with pytest.raises(ConfigError, match="global_batch_size=0"):
        SampleBatches(ORDER, 0)
    with pytest.raises(ConfigError, match="window_samples=0"):
        PackedBatches(ORDER, 1, PairPlanner(), window_samples=0)


def test_what_has_to_be_equal_says_the_batching():
    identities = [plan.identity() for plan in plans().values()]
    assert [identity["batching"] for identity in identities] == list(plans())
    assert identities[2]["packs_per_batch"] == 4
