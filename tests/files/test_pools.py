"""Jobs over processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from vipllava.files.pools import WorkerDied, run_jobs
from vipllava.types import RecordError, VipLlavaError


def square(number: int) -> int:
    return number * number


def work(job: str) -> str:
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "fail":
        raise RecordError("bad", "a-fault")
    return job.upper()


def test_jobs_of_this_process_come_in_order():
    assert list(run_jobs(square, [3, 1, 2], 0)) == [9, 1, 4]
    assert sorted(run_jobs(square, [3, 1, 2], None)) == [1, 4, 9]


def test_jobs_are_read_as_far_as_they_are_needed():
    given: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            given.append(number)
            yield number

    results = run_jobs(square, jobs(), 1)
    next(results)
    assert len(given) <= 4
    results.close()


def test_errors_travel():
    with pytest.raises(RecordError, match="bad") as caught:
        list(run_jobs(work, ["a", "fail"], 1))
    assert caught.value.fault == "a-fault"


def test_a_killed_worker_is_said():
    with pytest.raises(WorkerDied, match="run the same command again with fewer workers"):
        list(run_jobs(work, ["die"], 1))


def test_a_negative_number_of_workers():
    with pytest.raises(VipLlavaError, match="num_workers is -1"):
        list(run_jobs(square, [1], -1))
