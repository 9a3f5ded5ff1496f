"""Jobs over processes, and over the tasks of an event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import pytest

from vipllava.files.pools import WorkerDied, run_jobs, run_tasks
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


@asynccontextmanager
async def log_of_a_loop() -> AsyncGenerator[list[str]]:
    log = ["entered"]
    yield log
    SEEN.append([*log, "left"])


SEEN: list[list[str]] = []


async def take_time(log: list[str], seconds: float) -> float:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        log.append("cancelled")
        raise
    if seconds == 0.02:
        raise RecordError("bad", "a-fault")
    return seconds


def test_tasks_come_as_they_end_and_share_what_is_left_at_the_end():
    assert list(run_tasks(log_of_a_loop(), take_time, [0.3, 0.0, 0.1], 3)) == [0.0, 0.1, 0.3]
    assert SEEN.pop() == ["entered", "left"]
    assert list(run_tasks(log_of_a_loop(), take_time, [0.1, 0.0], 1)) == [0.1, 0.0]


def test_a_failing_task_ends_it_after_those_that_have_begun():
    found: list[float] = []
    with pytest.raises(RecordError, match="bad"):
        found.extend(run_tasks(log_of_a_loop(), take_time, [0.2, 0.02, 0.1], 2))
    assert found == [0.2]


def test_left_early_what_runs_is_cancelled():
    results = run_tasks(log_of_a_loop(), take_time, [0.0, 60.0, 60.0, 60.0], 3)
    assert next(results) == 0.0
    results.close()
    assert SEEN.pop() == ["entered", "cancelled", "cancelled", "left"]
    assert not [thread for thread in threading.enumerate() if thread.name == "run_tasks"]
