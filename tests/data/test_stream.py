from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from tests.data.conftest import Build
from tests.data.toy_data import encode_picture, said, toy_samples
from vipllava.data.stream import GlobalBatchSampler, StepLoader, VisualPromptDataset
from vipllava.types import Batch, CheckpointError, ConfigError, RecordError


def make_sampler(
    num_samples: int = 20, size: int = 8, accumulate: int = 1, world: int = 1, rank: int = 0
) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        "toy", num_samples, size, seed=7, accumulate=accumulate, world_size=world, rank=rank
    )


def make_loader(dataset: VisualPromptDataset, workers: int = 0, **division: int) -> StepLoader:
    sampler = make_sampler(len(dataset), **division)
    return StepLoader(dataset, sampler, pad_token_id=0, num_workers=workers)


def real_keys(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys if not key.endswith("#repeat")]


# The order.


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = make_sampler()
    assert sampler.order(0).tolist() == make_sampler().order(0).tolist()
    assert sorted(sampler.order(0).tolist()) == list(range(20))
    assert sampler.order(0).tolist() != sampler.order(1).tolist()
    other = GlobalBatchSampler("toy", 20, 8, seed=8)
    assert sampler.order(0).tolist() != other.order(0).tolist()
    # Literal: a change here would make old runs impossible to resume.
    assert make_sampler(8).order(0).tolist() == [6, 5, 4, 2, 3, 0, 7, 1]


def test_ranks_and_accumulation_only_divide() -> None:
    whole = [sorted(batch.tolist()) for batch in make_sampler(64).global_batches(2)]
    for world, accumulate in [(1, 4), (2, 1), (2, 2), (4, 2)]:
        steps: list[list[int]] = [[] for _ in range(8)]
        for rank in range(world):
            sampler = make_sampler(64, accumulate=accumulate, world=world, rank=rank)
            sampler.set_epoch(2)
            for step, share in enumerate(sampler):
                assert share.epoch == 2
                assert [len(m) for m in share.micro_batches] == [
                    8 // world // accumulate
                ] * accumulate
                steps[step] += [s.position for m in share.micro_batches for s in m]
        assert [sorted(step) for step in steps] == whole


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
        seen.update(s.position for m in last.micro_batches for s in m if not s.repeat)
    assert seen == Counter(make_sampler(16 + remainder).order(0)[16:].tolist())


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="global_batch_size=8 does not divide by accumulate=3 x"):
        make_sampler(accumulate=3)


# The loader.


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


def test_two_ranks_see_what_one_sees(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(20))
    one = list(make_loader(dataset, accumulate=2))
    ranks = [make_loader(dataset, accumulate=2, world=2, rank=rank) for rank in range(2)]
    shares = [[batch.num_supervised for batch in loader] for loader in ranks]
    asked: list[int] = []

    def all_reduce(value: int) -> int:
        step = len(asked)
        asked.append(value)
        return sum(sum(share[2 * step : 2 * step + 2]) for share in shares)

    ranks[0].all_reduce_sum = all_reduce
    first = list(ranks[0])
    assert [b.num_supervised_global for b in first] == [b.num_supervised_global for b in one]
    assert asked == [sum(shares[0][2 * step : 2 * step + 2]) for step in range(3)]
    both = Counter(real_keys(first)) + Counter(real_keys(ranks[1]))
    assert both == Counter(real_keys(one))


def test_repeats_carry_no_labels(build_dataset: Build) -> None:
    dataset = build_dataset(toy_samples(9))
    *_, last, repeated = make_loader(dataset, accumulate=2)
    assert repeated.keys == (f"{last.keys[0]}#repeat",)
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
        make_loader(dataset, size=4).load_state_dict({**state, "fingerprint": "0"})
    assert "fingerprint: saved '0', now" in str(error.value)
    with pytest.raises(CheckpointError, match="3 micro-batches into an optimizer step"):
        make_loader(dataset).load_state_dict({**state, "micro_batch": 3})
