"""The order of samples: every one as often as stated, whole shards at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vipllava.stream.order import Item, MixEntry, Part, SampleOrder, parse_mix, plan_parts
from vipllava.types import ConfigError

ONE = (Part("toy", (5, 7, 8), 20),)


def positions(order: SampleOrder, epoch: int) -> list[int]:
    return order.epoch(epoch).position.tolist()


def test_the_order_is_a_function_of_seed_and_epoch():
    order = SampleOrder(ONE, 7)
    assert positions(order, 0) == positions(SampleOrder(ONE, 7), 0)
    assert sorted(positions(order, 0)) == list(range(20))
    assert positions(order, 0) != positions(order, 1)
    assert positions(order, 0) != positions(SampleOrder(ONE, 8), 0)
    assert order.epoch(3).items(slice(0, 1)) == [Item(0, 3, positions(order, 3)[0])]


def test_the_order_is_pinned():
    """Literal: a change here would make old runs impossible to resume."""
    order = SampleOrder((Part("toy", (4, 4), 8),), 7, window_samples=4)
    assert positions(order, 0) == [2, 3, 0, 1, 5, 4, 7, 6]


def test_shards_stay_together_within_a_window():
    sizes = tuple([10] * 50)
    order = SampleOrder((Part("toy", sizes, 500),), 3, window_samples=30)
    shards = np.array(positions(order, 0)) // 10
    windows = shards[:480].reshape(-1, 30)
    assert all(len(set(window.tolist())) == 3 for window in windows)
    first = [tuple(sorted(set(window.tolist()))) for window in windows]
    assert len(set(first)) == len(first)
    assert sorted(shards.tolist()) == sorted(np.repeat(np.arange(50), 10).tolist())


def test_without_shuffling_the_shards_order_stays():
    order = SampleOrder(ONE, 7, shuffle=False)
    assert positions(order, 0) == list(range(20))


@pytest.mark.parametrize("epochs", [0.3, 0.5, 1.0, 2.0, 2.5])
def test_an_epoch_takes_the_next_stretch_of_an_endless_sequence(epochs: float):
    (part,) = plan_parts({"toy": (5, 7, 8)}, {"toy": MixEntry(epochs=epochs)})
    order = SampleOrder([part], 7)
    stream = [item for epoch in range(10) for item in order.epoch(epoch).items(slice(None))]
    assert len(stream) == round(10 * 20 * epochs)
    for epoch_pass in range(len(stream) // 20):
        whole = stream[20 * epoch_pass : 20 * epoch_pass + 20]
        assert {item.epoch_pass for item in whole} == {epoch_pass}
        assert sorted(item.position for item in whole) == list(range(20))


def test_a_mix_takes_each_data_set_as_often_as_stated_and_spreads_it():
    sizes = {"a": (40, 40), "b": (30,), "c": (100,)}
    mix = parse_mix({"a": {"epochs": 1}, "b": {"epochs": 2}, "c": {"epochs": 0.5}})
    order = SampleOrder(plan_parts(sizes, mix), 11)
    epoch = order.epoch(0)
    seen = Counter((item.part, item.position) for item in epoch.items(slice(None)))
    assert [seen[0, n] for n in range(80)] == [1] * 80
    assert [seen[1, n] for n in range(30)] == [2] * 30
    assert sum(seen[2, n] for n in range(100)) == 50
    assert len(epoch) == len(order) == 190
    # Any quarter of the epoch has about a quarter of each.
    for part, count in enumerate((80, 60, 50)):
        quarters = [int((quarter == part).sum()) for quarter in np.array_split(epoch.part, 4)]
        assert all(abs(found - count / 4) <= 3 for found in quarters), quarters
    # Each data set's own order is kept: its reads stay sequential.
    alone = SampleOrder(plan_parts({"b": (30,)}, {"b": MixEntry(epochs=2)}), 11).epoch(0)
    assert epoch.position[epoch.part == 1].tolist() == alone.position.tolist()


def test_weights_share_an_epoch_of_a_given_size():
    sizes = {"a": (1000,), "b": (10,)}
    mix = parse_mix({"a": {"weight": 3}, "b": {"weight": 1}})
    parts = plan_parts(sizes, mix, samples_per_epoch=100)
    assert [part.num_per_epoch for part in parts] == [75, 25]
    items = SampleOrder(parts, 0).epoch(0).items(slice(None))
    assert Counter(item.epoch_pass for item in items if item.part == 1) == {0: 10, 1: 10, 2: 5}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "name at least one data set"),
        ({"a": {}}, r"a has \{\}; give either epochs or weight"),
        ({"a": {"epochs": 1, "weight": 2}}, "give either epochs or weight"),
        ({"a": {"epochs": 0}}, r"a.epochs is 0; give a number above 0"),
        ({"a": {"weight": float("nan")}}, "give a number above 0"),
        ({"a": {"weight": True}}, "give a number above 0"),
        ({"a": {"weight": 1}, "b": {"epochs": 1}}, "use one of the two throughout"),
    ],
)
def test_bad_mixes(mix: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_mix(mix)


def test_shares_that_cannot_be():
    with pytest.raises(ConfigError, match=r"gives `a` \(4 samples\) no sample"):
        plan_parts({"a": (4,)}, {"a": MixEntry(epochs=0.1)})
    with pytest.raises(ConfigError, match="belongs to a mix by weight"):
        plan_parts({"a": (4,)}, {"a": MixEntry(epochs=1)}, samples_per_epoch=4)
    with pytest.raises(ConfigError, match="window_samples is 0"):
        SampleOrder(ONE, 1, window_samples=0)
