"""Jobs over processes: bounded in number, ended with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Final, TypeVar

from vipllava.types import VipLlavaError

_IN_FLIGHT: Final = 2  # jobs per worker that are handed out ahead
_MOST: Final = 16
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class WorkerDied(VipLlavaError):
    """A worker process was ended from outside."""


def default_num_workers() -> int:
    """Return one worker per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST, cores or 1)


def run_jobs(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], num_workers: int
) -> Generator[_Result]:
    """Yield results as they come.

    ``jobs`` is read as far as the workers get, so that it may be long.

    Args:
        work: a function of a module, to be found by the workers.
        jobs: its arguments; they and the results travel between processes.
        num_workers: processes; 0 works in this one, in the jobs' order.

    Raises:
        WorkerDied: a worker was killed, for want of memory most likely.
    """
    if num_workers < 0:
        raise VipLlavaError(f"num_workers is {num_workers}; expected 0 or more")
    if num_workers == 0:
        yield from map(work, jobs)
        return
    # Not forked: threads (torch's, a progress bar's) do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker)
    waiting: set[Future[_Result]] = set()
    try:
        for job in jobs:
            waiting.add(pool.submit(work, job))
            if len(waiting) >= _IN_FLIGHT * num_workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was ended from outside, for want of memory most likely; run the "
            "same command again with fewer workers (num_workers=)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Prepare a pool's process: Ctrl-C is its parent's, and it ends with that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the jobs
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot tell; without this its workers would wait for ever.
    threading.Thread(target=follow, daemon=True).start()
