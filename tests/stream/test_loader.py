"""The loader: division by position, denominators, resume, packs, faults."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy_data import Stored, encode_picture, said, toy_samples
from tests.toy_stream import Build
from vipllava.stream.batching import Cursor, GlobalBatch, PackedBatches, Row, SampleBatches
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import Item, Part, SampleOrder
from vipllava.stream.quarantine import BadSamplePolicy, QuarantineLog, read_quarantine
from vipllava.stream.ranks import Ranks
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import (
    Batch,
    CheckpointError,
    ConfigError,
    RecordError,
    StorageError,
    VipLlavaError,
)


def make_order(num_samples: int = 20) -> SampleOrder:
    return SampleOrder([Part("toy", (num_samples,), num_samples)], 7)


def make_sampler(
    num_samples: int = 20, size: int = 8, accumulate: int = 1, world: int = 1, rank: int = 0
) -> StepSampler:
    plan = SampleBatches(make_order(num_samples), size)
    return StepSampler(plan, accumulate=accumulate, world_size=world, rank=rank)


def make_loader(dataset: VisualPromptDataset, num_workers: int = 0, **division: Any) -> StepLoader:
    options = {name: division.pop(name) for name in ("quarantine_log", "ranks") if name in division}
    sampler = make_sampler(len(dataset.sources[0]), **division)
    return StepLoader(
        dataset, sampler, dataset.sample_encoder.collator(), num_workers=num_workers, **options
    )


def real_keys(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.counted_keys]


# Division.


def test_ranks_and_accumulation_only_divide() -> None:
    whole = [list(batch.rows) for batch in make_sampler(64).plan.batches(make_sampler(64).start)]
    for world, accumulate in [(1, 4), (2, 1), (2, 2), (4, 2)]:
        steps: list[list[Row | None]] = [[None] * 8 for _ in range(8)]
        for rank in range(world):
            sampler = make_sampler(64, accumulate=accumulate, world=world, rank=rank)
            for step, share in enumerate(sampler):
                assert [len(m) for m in share.micro_batches] == [
                    8 // world // accumulate
                ] * accumulate
                mine = [row for micro in share.micro_batches for row in micro]
                steps[step][rank::world] = mine
                assert share.repeats == (0,) * accumulate
        assert steps == whole


@pytest.mark.parametrize("remainder", range(1, 8))
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1), (2, 1)])
def test_the_remainder_is_seen_once_and_no_micro_batch_is_empty(
    remainder: int, world: int, accumulate: int
) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world):
        *_, last = make_sampler(16 + remainder, accumulate=accumulate, world=world, rank=rank)
        assert len(last.micro_batches) == accumulate
        sizes = [len(micro) for micro in last.micro_batches]
        assert min(sizes) >= 1
        assert max(sizes) <= 8 // world // accumulate
        for micro, repeats in zip(last.micro_batches, last.repeats, strict=True):
            seen.update(row[0].position for row in micro[: len(micro) - repeats])
    order = make_order(16 + remainder).epoch(0).position
    assert seen == Counter(order[16:].tolist())


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="global batch of 8 does not divide by accumulate=3 x"):
        make_sampler(accumulate=3)


# The loader.


def test_signals_are_heard_while_the_first_step_is_planned(build_dataset: Build) -> None:
    """Planning packs may wait for storage; only the start of workers holds signals."""
    held: list[set[int]] = []

    class Planned(SampleBatches):
        def batches(self, start: Cursor) -> Iterator[GlobalBatch]:
            held.append({int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, set())})
            yield from super().batches(start)

    dataset = build_dataset(toy_samples(8))
    sampler = StepSampler(Planned(make_order(8), 8))
    loader = StepLoader(dataset, sampler, dataset.sample_encoder.collator(), num_workers=1)
    batches = list(loader)
    loader.close()
    assert len(real_keys(batches)) == 8
    assert held == [set()]


def test_every_sample_once_and_denominators_of_the_global_batch(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(21))
    loader = make_loader(dataset, accumulate=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    assert sorted(real_keys(batches)) == [f"toy/s{n:03d}" for n in range(21)]
    for step in range(3):
        micro = batches[4 * step : 4 * step + 4]
        assert {b.num_supervised_global for b in micro} == {sum(b.num_supervised for b in micro)}
    # " yes" * n and </s>, one token a character.
    lengths = [3 * (1 + n % 4) + 2 for n in range(21)]
    assert sum(b.num_supervised for b in batches) == sum(lengths)


def test_it_adds_up_how_long_its_workers_were_waited_for(
    build_dataset: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each look at the clock is three seconds after the one before.
    clock = SimpleNamespace(perf_counter=count(0.0, 3.0).__next__)
    monkeypatch.setattr("vipllava.stream.loader.time", clock)
    loader = make_loader(build_dataset(toy_samples(20)), accumulate=2)
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.seconds_waited == 3.0  # two micro-batches of one step
    next(batches)
    assert loader.seconds_waited == 6.0


def test_two_ranks_see_what_one_sees(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(20))
    one = list(make_loader(dataset, accumulate=2))
    ranks = [make_loader(dataset, accumulate=2, world=2, rank=rank) for rank in range(2)]
    shares = [[batch.num_supervised for batch in loader] for loader in ranks]
    asked: list[int] = []

    def all_reduce(values: Sequence[int]) -> list[int]:
        step = len(asked)
        asked.append(values[0])
        total = sum(sum(share[2 * step : 2 * step + 2]) for share in shares)
        return [total, *values[1:]]

    ranks[0].ranks = Ranks(sum=all_reduce)
    first = list(ranks[0])
    assert [b.num_supervised_global for b in first] == [b.num_supervised_global for b in one]
    assert asked == [sum(shares[0][2 * step : 2 * step + 2]) for step in range(3)]
    both = Counter(real_keys(first)) + Counter(real_keys(ranks[1]))
    assert both == Counter(real_keys(one))


def test_repeats_carry_no_labels(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(9))
    *_, last, repeated = make_loader(dataset, accumulate=2)
    assert (repeated.keys, repeated.num_repeats) == (last.keys[:1], 1)
    assert repeated.num_supervised == 0
    assert repeated.num_supervised_global == last.num_supervised_global == last.num_supervised


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(build_dataset: Build, workers: int) -> None:
    dataset = build_dataset(toy_samples(20))
    plain, fast = make_loader(dataset, accumulate=2), make_loader(dataset, workers, accumulate=2)
    state = torch.random.get_rng_state()
    for epoch in range(2):  # the workers persist
        for loader in (plain, fast):
            loader.sampler.set_epoch(epoch)
        for expected, batch in zip(plain, fast, strict=True):
            assert batch.keys == expected.keys
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.pixel_values, expected.pixel_values)
            assert batch.num_supervised_global == expected.num_supervised_global
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_the_stream_with_a_plain_message(
    build_dataset: Build, workers: int
) -> None:
    bad = {"id": 1, "conversations": said("<image>\nHi", "yes"), "bboxes": [[9, 9, 5, 5]]}
    dataset = build_dataset([*toy_samples(11), ("bad", bad, encode_picture(), "jpg")])
    with pytest.raises(RecordError, match=r"^\S*toy/shard-000001\.tar: toy/bad: field `bboxes"):
        list(make_loader(dataset, workers))


# Resume.


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("consumed", [0, 1, 2, 5, 6])
def test_resume_continues_at_the_next_micro_batch(
    build_dataset: Build, workers: int, consumed: int
) -> None:
    dataset = build_dataset(toy_samples(20))
    loader = make_loader(dataset, workers, accumulate=2)
    loader.sampler.set_epoch(3)
    stream = iter(loader)
    for _ in range(consumed):
        next(stream)
    state = loader.state_dict()
    rest = [(b.keys, b.num_supervised_global) for b in stream]
    assert state["step"] == consumed // 2 if consumed else state["epoch"] == 3

    resumed = make_loader(dataset, workers, accumulate=2)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)  # as Lightning does
    assert resumed.state_dict() == state
    assert len(resumed) == 6  # the epoch's length: Lightning counts from its start
    assert [(b.keys, b.num_supervised_global) for b in resumed] == rest
    resumed.sampler.set_epoch(4)
    assert len(list(resumed)) == 6


def test_resume_at_a_step_with_other_ranks(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(20))
    loader = make_loader(dataset, accumulate=4)
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    state = loader.state_dict()
    rest = Counter(real_keys(stream))
    resumed = Counter[str]()
    for rank in range(2):
        other = make_loader(dataset, accumulate=1, world=2, rank=rank)
        other.load_state_dict(state)
        resumed += Counter(real_keys(other))
    assert resumed == rest


def test_the_next_epoch_starts_at_its_beginning(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(10))
    loader = make_loader(dataset)
    assert len(list(loader)) == 2
    finished = loader.state_dict()
    assert (finished["epoch"], finished["step"]) == (0, 2)
    loader.sampler.set_epoch(1)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (1, 0)
    resumed = make_loader(dataset)
    resumed.load_state_dict(finished)
    resumed.sampler.set_epoch(1)
    assert len(list(resumed)) == 2


def test_other_data_are_refused(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(10))
    state = make_loader(dataset).state_dict()
    with pytest.raises(CheckpointError, match="global_batch_size: saved 8, now 4") as error:
        make_loader(dataset, size=4).load_state_dict({**state, "data": {"toy": "0"}})
    assert "data: saved {'toy': '0'}, now {'toy': '" in str(error.value)
    with pytest.raises(CheckpointError, match="3 micro-batches into an optimizer step"):
        make_loader(dataset).load_state_dict({**state, "micro_batch": 3})


def test_the_state_is_a_few_numbers(build_dataset: Build) -> None:
    state = make_loader(build_dataset(toy_samples(10))).state_dict()
    assert len(json.dumps(state)) < 400


# Packs.


class PairPlanner:
    """Two neighbours share a row."""

    def __call__(
        self, items: Sequence[Item], rng: np.random.Generator, name: str
    ) -> tuple[Row, ...]:
        return tuple(tuple(items[at : at + 2]) for at in range(0, len(items), 2))


def make_packed(dataset: VisualPromptDataset, **options: Any) -> StepLoader:
    plan = PackedBatches(make_order(len(dataset.sources[0])), 4, PairPlanner(), window_samples=8)
    collator = dataset.sample_encoder.collator(pack_length=1024)
    return StepLoader(dataset, StepSampler(plan), collator, **options)


def test_packs_share_rows_of_one_length(build_dataset: Build) -> None:
    batches = list(make_packed(build_dataset(toy_samples(21))))
    assert sorted(real_keys(batches)) == [f"toy/s{n:03d}" for n in range(21)]
    assert [batch.input_ids.shape for batch in batches] == [(4, 1024), (4, 1024), (3, 1024)]
    progress = [batch.progress for batch in batches]
    assert progress == pytest.approx([8 / 21, 16 / 21, 1.0])
    first = batches[0]
    assert first.segment_ids.unique().tolist() == [-1, 0, 1]
    starts = (first.position_ids == 0) & (first.segment_ids >= 0)
    assert starts.sum(dim=1).tolist() == [2, 2, 2, 2]


def test_packs_go_on_at_window_and_row(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(21))
    loader = make_packed(dataset)
    stream = iter(loader)
    next(stream)
    state = loader.state_dict()
    assert (state["window"], state["row"], state["samples"]) == (1, 0, 8)
    resumed = make_packed(dataset)
    resumed.load_state_dict(state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in stream]


# Faults.


def corrupt(samples: list[Stored], *places: int) -> list[Stored]:
    """Cut the pictures at ``places`` short: the header is whole, decoding fails."""
    for place in places:
        key, record, image, extension = samples[place]
        assert image is not None
        samples[place] = key, record, image[: len(image) // 2], extension
    return samples


def quarantining(dataset: VisualPromptDataset, rate: float = 1.0) -> VisualPromptDataset:
    return VisualPromptDataset(
        dataset.sources, dataset.sample_encoder, BadSamplePolicy("quarantine", max_fault_rate=rate)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_quarantine_puts_the_same_substitute_in_place_and_writes_it_down(
    build_dataset: Build, tmp_path: Path, packed: bool
) -> None:
    good = build_dataset(corrupt(toy_samples(20), 3, 6))
    dataset = quarantining(good)
    found: list[list[tuple[str, ...]]] = []
    for name, workers in (("a", 0), ("b", 1)):
        log = QuarantineLog(tmp_path / name, dataset.policy)
        options: dict[str, Any] = {"num_workers": workers, "quarantine_log": log}
        loader = make_packed(dataset, **options) if packed else make_loader(dataset, **options)
        batches = list(loader)
        found.append([batch.keys for batch in batches])
        entries = {entry["key"]: entry for entry in read_quarantine(tmp_path / name)}
        assert sorted(entries) == ["s003", "s006"]
        assert log.total == 2
        assert entries["s003"]["shard"].endswith("shard-000000.tar")
        assert "cannot be decoded" in entries["s003"]["reason"]
        assert entries["s003"]["fault"] == "image-corrupt"
        keys = Counter(real_keys(batches))
        expected = Counter({f"toy/s{n:03d}": 1 for n in range(20) if n not in (3, 6)})
        expected.update(f"toy/{entry['substitute']}" for entry in entries.values())
        assert keys == expected
    assert found[0] == found[1]


def test_quarantine_ends_above_its_rate(build_dataset: Build) -> None:
    dataset = quarantining(build_dataset(corrupt(toy_samples(20), 3, 6)), rate=0.001)
    with pytest.raises(RecordError, match=r"2 of .* samples are bad"):
        list(make_loader(dataset))


def test_a_rank_without_a_fault_stops_with_the_one_that_has_it(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(8))
    ranks = Ranks(
        sum=lambda mine: [*mine[:-1], mine[-1] + 1],
        gather=lambda mine: [mine, "RecordError: toy/s9 is bad"],
    )
    with pytest.raises(VipLlavaError, match=r"of other ranks .*\srank 1: Record.*toy/s9 is bad"):
        list(make_loader(dataset, ranks=ranks))


class Told:
    """What a rank tells the others: how many errors, and which."""

    def __init__(self) -> None:
        self.failed: list[int] = []
        self.texts: list[str | None] = []

    def sum(self, mine: Sequence[int]) -> list[int]:
        self.failed.append(mine[-1])
        return list(mine)

    def gather(self, mine: str | None) -> list[str | None]:
        self.texts.append(mine)
        return [mine]

    @property
    def ranks(self) -> Ranks:
        return Ranks(sum=self.sum, gather=self.gather)

    def run(self, loader: StepLoader) -> None:
        try:
            for _ in loader:
                pass
        finally:
            loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_others_hear_of_any_error(
    build_dataset: Build, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a mistake in the code")

    monkeypatch.setattr(VisualPromptDataset, "make", fail)
    told = Told()
    dataset = build_dataset(toy_samples(8))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a mistake in the code"):
        told.run(make_loader(dataset, workers, ranks=told.ranks))
    assert told.failed == [1]
    assert "a mistake in the code" in str(told.texts)


def test_the_others_hear_of_a_worker_that_was_killed(
    build_dataset: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisualPromptDataset, "make", lambda *_: os.kill(os.getpid(), 9))
    told = Told()
    dataset = build_dataset(toy_samples(8))
    with pytest.raises(RuntimeError, match="worker"):
        told.run(make_loader(dataset, 1, ranks=told.ranks))
    assert told.failed == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_others_hear_of_a_plan_that_fails(build_dataset: Build, workers: int) -> None:
    """When it is its turn: the steps before it are whole."""

    class Plan(PairPlanner):
        def __call__(self, items: Sequence[Item], rng: Any, name: str) -> tuple[Row, ...]:
            if name == "epoch0-window1":
                raise StorageError("silent")
            return super().__call__(items, rng, name)

    dataset = build_dataset(toy_samples(20))
    told = Told()
    plan = PackedBatches(make_order(20), 2, Plan(), window_samples=8)
    loader = StepLoader(
        dataset,
        StepSampler(plan),
        dataset.sample_encoder.collator(),
        num_workers=workers,
        ranks=told.ranks,
    )
    with pytest.raises(StorageError, match="silent"):
        told.run(loader)
    assert (told.failed, told.texts) == ([0, 0, 1], ["StorageError: silent"])


def test_the_others_hear_of_a_quarantine_file_that_cannot_be_written(
    build_dataset: Build, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    dataset = quarantining(build_dataset(corrupt(toy_samples(20), 3)))
    told = Told()
    log = QuarantineLog(tmp_path / "file" / "q.jsonl", dataset.policy)
    with pytest.raises(StorageError, match=r"q\.jsonl cannot be written .*free some space"):
        told.run(make_loader(dataset, quarantine_log=log, ranks=told.ranks))
    assert told.failed[-1] == 1
