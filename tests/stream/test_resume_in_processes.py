"""What is consumed does not depend on ranks, workers or kills: real processes, real Lightning."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.stream.stream_job import Job, consumed, start
from tests.toy_data import toy_samples
from vipllava.shards.tars import write_shards

NUM_SAMPLES = 22
BATCHINGS = {
    "shuffled": {},
    "length_grouped": {"batching": "length_grouped"},
    # Four image positions and a short text: three or four samples a pack.
    "packed": {"batching": "packed", "pack_length": 1024, "max_images_per_pack": 3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    write_shards(toy_samples(NUM_SAMPLES), path / "toy", max_samples=7)
    return path


def sequence(root: Path, name: str) -> str:
    """Return a digest of the sequence of consumed keys, and check what an epoch holds."""
    batches = consumed(root, name)
    for epoch in range(2):
        keys = [
            key for (e, _), rows in batches.items() if e == epoch for row in rows for key in row
        ]
        assert Counter(keys) == Counter({f"toy/s{n:03d}": 1 for n in range(NUM_SAMPLES)}), epoch
    return hashlib.sha256(repr(list(batches.items())).encode()).hexdigest()


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, str]:
    """The uninterrupted runs on one rank without workers."""
    for name, data in BATCHINGS.items():
        assert start(Job(root, f"whole-{name}", data=_data(data))) == [0]
    return {name: sequence(root, f"whole-{name}") for name in BATCHINGS}


def _data(data: dict) -> dict:
    return {"seed": 3, **data}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 4), (2, 0), (2, 1)])
@pytest.mark.slow
def test_ranks_and_workers_change_nothing(
    root: Path, whole: dict[str, str], batching: str, ranks: int, workers: int
):
    name = f"{batching}-{ranks}-{workers}"
    data = _data(BATCHINGS[batching])
    job = Job(root, name, ranks, workers, micro_batch_size=1 if ranks == 2 else 2, data=data)
    assert start(job) == [0] * ranks
    assert sequence(root, name) == whole[batching]


# Two epochs are twelve steps, packed four.
KILLS = [
    *((batching, step) for batching in ("shuffled", "length_grouped") for step in (1, 4, 7, 9)),
    *(("packed", step) for step in (1, 2, 3)),
]


@pytest.mark.parametrize(("batching", "kill_at"), KILLS)
@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (1, 1)), ((1, 1), (2, 0)), ((2, 1), (1, 0))]
)
@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_very_sample(
    root: Path,
    whole: dict[str, str],
    batching: str,
    kill_at: int,
    before: tuple[int, int],
    after: tuple[int, int],
):
    name = f"killed-{batching}-{kill_at}-{before[0]}{before[1]}{after[0]}{after[1]}"
    data = _data(BATCHINGS[batching])

    def job(attempt: int, division: tuple[int, int], kill_at: int | None) -> Job:
        ranks, workers = division
        return Job(root, name, ranks, workers, 2 // ranks, 2, attempt, kill_at, data)

    assert start(job(0, before, kill_at))[0] == -signal.SIGKILL
    assert start(job(1, after, None)) == [0] * after[0]
    assert sequence(root, name) == whole[batching]


def test_a_run_killed_on_two_ranks_goes_on_on_one(root: Path):
    """The quick one of the many above."""
    data = _data(BATCHINGS["packed"])
    assert start(Job(root, "one", data=data)) == [0]
    assert start(Job(root, "two", 2, 0, 1, kill_at=2, data=data)) == [-9, -9]
    assert start(Job(root, "two", 1, 1, 2, attempt=1, data=data)) == [0]
    assert sequence(root, "two") == sequence(root, "one")
