"""Conversations over the length limit in the stream: cut, counted, named, packed, refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.toy_data import Stored, encode_picture, said, toy_samples
from tests.toy_stream import Build
from vipllava.conversation.encode import ConversationEncoder
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import Item, Part, SampleOrder
from vipllava.stream.pack_planner import plan_batches
from vipllava.stream.quarantine import BadSamplePolicy, QuarantineLog, read_quarantine
from vipllava.stream.ranks import Ranks
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import RecordError

LIMIT = 300


def long_one(key: str, *texts: str) -> Stored:
    return key, {"id": key, "conversations": said(*texts)}, encode_picture(), "jpg"


def cutting(build: Build, samples: Sequence[Stored]) -> VisualPromptDataset:
    """Open the samples for training that cuts at ``LIMIT``."""
    dataset = build(samples)
    base = dataset.sample_encoder.conversation_encoder
    sizes = base.image_token_id, base.image_seq_length, LIMIT
    encoder = ConversationEncoder(base.tokenizer, base.template, *sizes, "cut")
    dataset.sample_encoder.conversation_encoder = encoder
    return dataset


def with_long_ones(build: Build) -> VisualPromptDataset:
    long_ones = [long_one(f"long{n}", "Hi", "yes" * 200, "And?", "no") for n in range(3)]
    return cutting(build, [*toy_samples(6), *long_ones])


def make_loader(dataset: VisualPromptDataset, accumulate: int = 1, **options: object) -> StepLoader:
    order = SampleOrder([Part("toy", (len(dataset.sources[0]),), len(dataset.sources[0]))], 7)
    plan = plan_batches("shuffled", order, 4, dataset, pack_length=LIMIT, max_images=9)
    sampler = StepSampler(plan, accumulate=accumulate)
    return StepLoader(dataset, sampler, dataset.sample_encoder.collator(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_they_are_cut_and_counted_and_the_first_is_named(
    build_dataset: Build, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    loader = make_loader(with_long_ones(build_dataset), accumulate=4, num_workers=workers)
    with caplog.at_level(logging.WARNING, "vipllava.stream.loader"):
        batches = list(loader)
    loader.close()
    assert batches[-1].num_repeats == 1  # nine samples in places of four: repeats count once
    assert loader.num_truncated == 3
    assert max(batch.input_ids.shape[1] for batch in batches) == LIMIT
    (line,) = caplog.messages
    assert line.startswith("toy/long")
    assert "does not fit into max_length and is shortened" in line
    loader.sampler.set_epoch(1)
    list(loader)
    loader.close()
    assert loader.num_truncated == 6


def test_the_count_goes_on_after_a_resume(build_dataset: Build) -> None:
    dataset = with_long_ones(build_dataset)
    loader = make_loader(dataset)
    stream = iter(loader)
    _ = next(stream), next(stream)
    state, counted = loader.state_dict(), loader.num_truncated
    list(stream)
    resumed = make_loader(dataset)
    resumed.load_state_dict(state)
    assert resumed.num_truncated == counted
    list(resumed)
    assert resumed.num_truncated == loader.num_truncated == 3
    older = {name: value for name, value in state.items() if name != "num_truncated"}
    resumed.load_state_dict(older)
    assert resumed.num_truncated == 0


def test_those_of_other_ranks_count(build_dataset: Build) -> None:
    dataset = cutting(build_dataset, toy_samples(4))
    loader = make_loader(dataset, ranks=Ranks(sum=lambda mine: [*mine[:2], mine[2] + 5, mine[3]]))
    list(loader)
    assert loader.num_truncated == 5


def test_packs_are_planned_from_the_lengths_that_are_left(build_dataset: Build) -> None:
    dataset = with_long_ones(build_dataset)
    assert [dataset.measure(Item(0, 0, n))[0] for n in (6, 7, 8)] == [LIMIT] * 3
    order = SampleOrder([Part("toy", (9,), 9)], 7)
    plan = plan_batches("packed", order, 2, dataset, pack_length=LIMIT, max_images=9)
    collator = dataset.sample_encoder.collator(pack_length=LIMIT)
    batches = list(StepLoader(dataset, StepSampler(plan), collator))
    keys = sorted(key for batch in batches for key in batch.counted_keys)
    assert keys == sorted([f"toy/s00{n}" for n in range(6)] + [f"toy/long{n}" for n in range(3)])
    assert {batch.input_ids.shape[1] for batch in batches} == {LIMIT}


def test_nothing_left_to_learn_is_a_bad_sample(build_dataset: Build, tmp_path: Path) -> None:
    samples = [*toy_samples(6), long_one("bad", "why " * 100, "yes")]
    dataset = cutting(build_dataset, samples)
    with pytest.raises(RecordError, match=r"toy/bad.*300, which leaves no token") as error:
        list(make_loader(dataset))
    assert error.value.fault == "unsupervised"
    dataset.policy = BadSamplePolicy("quarantine", max_fault_rate=1)
    written = QuarantineLog(tmp_path / "q.jsonl", dataset.policy)
    loader = make_loader(dataset, quarantine_log=written)
    list(loader)
    (entry,) = read_quarantine(tmp_path / "q.jsonl")
    assert (entry["key"], entry["fault"]) == ("bad", "unsupervised")
    assert (written.total, loader.num_truncated) == (1, 0)
