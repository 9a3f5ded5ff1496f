"""Quarantine: the same substitute everywhere, every fault written once, an end above the rate."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from vipllava.stream.order import Item
from vipllava.stream.quarantine import (
    BadSample,
    BadSamplePolicy,
    QuarantineLog,
    candidates,
    read_quarantine,
    with_substitute,
)
from vipllava.types import ConfigError, RecordError, VipLlavaError

BAD = Item(0, 2, 5)
QUARANTINE = BadSamplePolicy("quarantine", 0.01)


def fault(key: str, epoch_pass: int = 0) -> BadSample:
    return BadSample(
        "toy", key, "toy/0.tar", 1024, epoch_pass, "image-corrupt", "cannot be decoded", "s1"
    )


def describe(item: Item, error: VipLlavaError, other: Item) -> BadSample:
    return BadSample(
        "toy", str(item.position), "0.tar", 0, item.epoch_pass, "x", str(error), f"{other[2]}"
    )


def make(item: Item) -> str:
    if item.position in (BAD.position, 3, 4):
        raise RecordError(f"sample {item.position} is bad")
    return f"made {item.position}"


def test_substitutes_are_a_function_of_the_sample():
    first = [item.position for item in candidates(BAD, 100, seed=7, name="toy")]
    assert first == [item.position for item in candidates(BAD, 100, seed=7, name="toy")]
    assert first[:3] == [12, 25, 83]
    assert first != [
        c.position for c in candidates(BAD._replace(epoch_pass=3), 100, seed=7, name="toy")
    ]
    assert {item.epoch_pass for item in candidates(BAD, 100, seed=7, name="toy")} == {
        BAD.epoch_pass
    }


def test_a_good_sample_needs_none():
    made = with_substitute(Item(0, 0, 1), make, describe, QUARANTINE, iter([]))
    assert made == ("made 1", Item(0, 0, 1), None)


def test_the_first_good_substitute_is_taken_and_the_first_error_told():
    others = [BAD._replace(position=n) for n in (3, 4, 9, 8)]
    made, item, found = with_substitute(BAD, make, describe, QUARANTINE, iter(others))
    assert (made, item.position) == ("made 9", 9)
    assert found == BadSample("toy", "5", "0.tar", 0, 2, "x", "sample 5 is bad", "9")


def test_by_the_policy_error_it_is_the_samples_own():
    with pytest.raises(RecordError, match="sample 5 is bad"):
        with_substitute(BAD, make, describe, BadSamplePolicy(), iter([Item(0, 0, 9)]))


def test_without_any_good_substitute_the_job_ends():
    others = [BAD._replace(position=3)] * 3
    with pytest.raises(RecordError, match=r"sample 5 is bad\nNone of .* is good either"):
        with_substitute(BAD, make, describe, QUARANTINE, iter(others))


def test_lines_are_whole_and_written_once(tmp_path: Path):
    path = tmp_path / "run" / "quarantine.jsonl"
    log = QuarantineLog(path, QUARANTINE)
    log.write([fault("a"), fault("b"), fault("a")])
    QuarantineLog(path, QUARANTINE).write([fault("b"), fault("b", epoch_pass=1)])  # a resumed run
    entries = read_quarantine(path)
    assert [(entry["key"], entry["epoch_pass"]) for entry in entries] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
    ]
    assert entries[0] == json.loads(path.read_text().splitlines()[0])
    assert set(entries[0]) >= {"key", "shard", "offset", "reason"}


def _write_many(path: Path, rank: int) -> None:
    log = QuarantineLog(path, QUARANTINE)
    for number in range(50):
        log.write([fault(f"{rank}-{number}")])


def test_several_ranks_share_the_file(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_write_many, args=(path, rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    keys = sorted(entry["key"] for entry in read_quarantine(path))
    assert keys == sorted(f"{rank}-{number}" for rank in range(3) for number in range(50))


def test_too_many_faults_end_the_job(tmp_path: Path):
    log = QuarantineLog(tmp_path / "q.jsonl", QUARANTINE)
    for _ in range(5):
        log.count(2, 50)  # 10 of 250: as of 1000 samples, exactly the rate
    with pytest.raises(RecordError, match=r"11 of 300 samples are bad, more than .*=0.01 allows"):
        log.count(1, 50)


def test_faults_met_while_planning_count_with_the_next_step(tmp_path: Path):
    log = QuarantineLog(tmp_path / "q.jsonl", QUARANTINE)
    log.add([fault("a"), fault("b")])
    assert (log.take_pending(), log.take_pending()) == (2, 0)
    assert len(read_quarantine(tmp_path / "q.jsonl")) == 2


def test_bad_policies():
    with pytest.raises(ConfigError, match="on_fault=skip: expected one of error"):
        BadSamplePolicy("skip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_fault_rate=2"):
        BadSamplePolicy("quarantine", 2)
