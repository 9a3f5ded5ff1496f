"""Planning packs: true lengths, one plan per job, substitutes that fit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.toy_data import said, toy_samples
from tests.toy_stream import Build
from vipllava.keyed_random import generator_for
from vipllava.stream import pack_planner
from vipllava.stream.batching import Row
from vipllava.stream.order import Item
from vipllava.stream.pack_planner import PackPlanner, SharedPlans
from vipllava.stream.quarantine import BadSample, BadSamplePolicy
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import ConfigError, RecordError, VipLlavaError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

distributed: Any = torch.distributed
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
    lenient = VisualPromptDataset(
        dataset.sources, dataset.sample_encoder, BadSamplePolicy("quarantine")
    )
    faults: list[BadSample] = []
    packs = plan(PackPlanner(lenient, pack_length=2048, max_images=8, on_faults=faults.extend))
    (fault,) = faults
    assert (fault.key, fault.substitute) != ("", "")
    positions = Counter(item.position for row in packs for item in row)
    assert positions[4] == 0
    assert positions.total() == 20
    assert positions[int(fault.substitute[1:])] == 2


def test_impossible_packs(build_dataset: Build):
    dataset = build_dataset(toy_samples(4))
    with pytest.raises(ConfigError, match=r"pack_length=1024 is less than max_length="):
        PackPlanner(dataset, pack_length=1024, max_images=8)
    with pytest.raises(ConfigError, match="max_images=0"):
        PackPlanner(dataset, pack_length=2048, max_images=0)


# One plan for all ranks.


def make_store() -> Store:
    return distributed.HashStore()


def test_rank_0_plans_and_the_others_read() -> None:
    store, calls = make_store(), []

    def make() -> tuple[Row, ...]:
        calls.append("planned")
        return ROWS

    found: list[tuple[Row, ...]] = []
    reader = SharedPlans(store, rank=1, timeout_s=20)
    waiting = threading.Thread(target=lambda: found.append(reader.get("w0", make)))
    waiting.start()
    assert SharedPlans(store, rank=0, timeout_s=20).get("w0", make) == ROWS
    waiting.join()
    assert found == [ROWS]
    assert calls == ["planned"]
    assert isinstance(found[0][0][0], Item)


def test_an_error_of_the_planner_reaches_the_others() -> None:
    def fail() -> tuple[Row, ...]:
        raise RecordError("sample 4 is bad")

    store = make_store()
    with pytest.raises(RecordError, match="sample 4 is bad"):
        SharedPlans(store, rank=0, timeout_s=20).get("w0", fail)
    with pytest.raises(VipLlavaError, match=r"rank 0 could not plan .*: RecordError: sample 4"):
        SharedPlans(store, rank=1, timeout_s=20).get("w0", fail)


def test_a_planner_that_measures_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pack_planner, "_BEAT_S", 0.0)
    reader = SharedPlans(make_store(), rank=1, timeout_s=0.2)
    with pytest.raises(VipLlavaError, match=r"rank 0, .* measured no sample for 0 s: see what"):
        reader.get("w0", lambda: ROWS)


def test_a_planner_that_takes_long_is_waited_for(
    build_dataset: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty samples of 0.1 s each, where half a second without any would be the end."""
    monkeypatch.setattr(pack_planner, "_BEAT_S", 0.0)
    store = make_store()
    dataset = build_dataset(toy_samples(20))
    measure = dataset.measure
    monkeypatch.setattr(dataset, "measure", lambda item: (time.sleep(0.1), measure(item))[1])
    found: list[tuple[Row, ...]] = []
    ranks = [SharedPlans(store, rank=rank, timeout_s=1.0) for rank in range(2)]
    planners = [
        PackPlanner(dataset, pack_length=2048, max_images=4, shared=shared) for shared in ranks
    ]
    waiting = threading.Thread(target=lambda: found.append(plan(planners[1])))
    waiting.start()
    assert plan(planners[0])
    waiting.join()
    assert len(found) == 1


def _plan_and_die(port: int) -> None:
    store = distributed.TCPStore("127.0.0.1", port, 2, is_master=True)
    SharedPlans(store, rank=0, timeout_s=60).get("w0", lambda: ROWS)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_planner_that_was_killed_is_noticed_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_plan_and_die, args=(port,))
    process.start()
    store = distributed.TCPStore("127.0.0.1", port, 2, is_master=False)
    reader = SharedPlans(store, rank=1, timeout_s=600)
    assert reader.get("w0", lambda: ()) == ROWS
    with pytest.raises(VipLlavaError, match=r"rank 0, which plans .*, is gone"):
        reader.get("w1", lambda: ())
    process.join(30)
    assert process.exitcode == -9


def test_old_plans_are_removed() -> None:
    store = make_store()
    shared = SharedPlans(store, rank=0, timeout_s=20)
    for window in range(20):
        shared.get(f"w{window}", lambda: ROWS)
    assert [window for window in range(20) if store.check([f"w{window}"])] == list(range(12, 20))
