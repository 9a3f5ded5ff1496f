"""Planning packs: true lengths, one planner per node, substitutes that fit."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import Build
from tests.data.toy_data import said, toy_samples
from vipllava.data.batching import Row
from vipllava.data.faults import Fault, FaultPolicy
from vipllava.data.order import Item
from vipllava.data.pack_planner import PackPlanner, PlanStore
from vipllava.data.stream import VisualPromptDataset
from vipllava.keyed_random import generator_for
from vipllava.types import ConfigError, RecordError, VipLlavaError

ITEMS = [Item(0, 0, position) for position in range(20)]
ROWS: tuple[Row, ...] = ((Item(0, 1, 5), Item(0, 1, 3)), (Item(0, 1, 9),))


def plan(planner: PackPlanner, seed: int = 0) -> tuple[Row, ...]:
    return planner(ITEMS, generator_for(seed), "epoch0-window0")


def test_packs_hold_every_sample_once_and_fit(build_dataset: Build):
    dataset = build_dataset(toy_samples(20))
    packs = plan(PackPlanner(dataset, pack_length=2048, max_images=4))
    assert Counter(item for row in packs for item in row) == Counter(ITEMS)
    assert len(packs) < 20
    for row in packs:
        samples = [dataset.make(item) for item in row]
        assert sum(sample.encoded.length for sample in samples) <= 2048
        assert sum(sample.encoded.num_images for sample in samples) <= 4


def test_the_plan_is_a_function_of_items_and_generator(build_dataset: Build):
    planner = PackPlanner(build_dataset(toy_samples(20)), pack_length=2048, max_images=8)
    assert plan(planner) == plan(planner)
    assert plan(planner) != plan(planner, seed=1)


def test_a_bad_text_gets_a_substitute_when_planned(build_dataset: Build):
    samples = toy_samples(20)
    samples[4] = ("s004", {"id": 4, "conversations": said("Hi")}, None, None)
    dataset = build_dataset(samples)
    with pytest.raises(RecordError, match="toy/s004: field `conversations`"):
        plan(PackPlanner(dataset, pack_length=2048, max_images=8))
    lenient = VisualPromptDataset(dataset.sources, dataset.encoder, FaultPolicy("quarantine"))
    faults: list[Fault] = []
    packs = plan(PackPlanner(lenient, pack_length=2048, max_images=8, on_faults=faults.extend))
    (fault,) = faults
    assert (fault.key, fault.substitute) != ("", "")
    positions = Counter(item.position for row in packs for item in row)
    assert positions[4] == 0
    assert positions.total() == 20
    assert positions[int(fault.substitute[1:])] == 2


def test_impossible_packs(build_dataset: Build):
    dataset = build_dataset(toy_samples(4))
    with pytest.raises(ConfigError, match=r"data.pack_length=1024 is less than stage.max_length="):
        PackPlanner(dataset, pack_length=1024, max_images=8)
    with pytest.raises(ConfigError, match="max_images_per_pack=0"):
        PackPlanner(dataset, pack_length=2048, max_images=0)


# The store.


def test_one_rank_plans_and_the_others_read(tmp_path: Path):
    calls: list[str] = []

    def make() -> tuple[Row, ...]:
        calls.append("planned")
        return ROWS

    found: list[tuple[Row, ...]] = []
    reader = PlanStore(tmp_path, "job", writes=False, timeout_s=20)
    waiting = threading.Thread(target=lambda: found.append(reader.get("w0", make)))
    waiting.start()
    assert PlanStore(tmp_path, "job", writes=True).get("w0", make) == ROWS
    waiting.join()
    assert found == [ROWS]
    assert calls == ["planned"]
    assert isinstance(found[0][0][0], Item)


def test_an_error_of_the_planner_reaches_the_others(tmp_path: Path):
    def fail() -> tuple[Row, ...]:
        raise RecordError("sample 4 is bad")

    with pytest.raises(RecordError, match="sample 4 is bad"):
        PlanStore(tmp_path, "job", writes=True).get("w0", fail)
    with pytest.raises(VipLlavaError, match="planning on this node failed: sample 4 is bad"):
        PlanStore(tmp_path, "job", writes=False).get("w0", fail)
    # Started again, the rank that plans clears the old failure first.
    PlanStore(tmp_path, "job", writes=True).get("w0", lambda: ROWS)
    assert PlanStore(tmp_path, "job", writes=False).get("w0", fail) == ROWS


def test_waiting_is_bounded(tmp_path: Path):
    store = PlanStore(tmp_path, "job", writes=False, timeout_s=0.1)
    with pytest.raises(VipLlavaError, match=r"no plan .*w0.npz after 0 s: the rank that plans"):
        store.get("w0", lambda: ROWS)


def test_plans_of_another_job_are_not_seen(tmp_path: Path):
    PlanStore(tmp_path, "one", writes=True).get("w0", lambda: ROWS)
    with pytest.raises(VipLlavaError, match="no plan"):
        PlanStore(tmp_path, "two", writes=False, timeout_s=0.1).get("w0", lambda: ROWS)


def test_old_plans_are_removed_and_nothing_partial_stays(tmp_path: Path):
    store = PlanStore(tmp_path, "job", writes=True)
    for window in range(20):
        store.get(f"w{window}", lambda: ROWS)
    left = sorted(path.name for path in store.directory.iterdir())
    assert len(left) == 8
    assert left == sorted(f"w{window}.npz" for window in range(12, 20))


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VipLlavaError, match=r"cannot be written .*data\.plan_dir"):
        PlanStore(tmp_path / "file", "job", writes=True).get("w0", lambda: ROWS)


def test_rows_of_any_shape_survive(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = tuple(
        tuple(Item(*map(int, rng.integers(0, 1000, 3))) for _ in range(rng.integers(1, 6)))
        for _ in range(50)
    )
    PlanStore(tmp_path, "job", writes=True).get("w", lambda: rows)
    assert PlanStore(tmp_path, "job", writes=False).get("w", lambda: ()) == rows
