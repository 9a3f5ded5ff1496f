"""Jobs over processes, threads or tasks: bounded in number, ended with whoever started them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

from vipllava.types import VipLlavaError

_IN_FLIGHT: Final = 4  # jobs per worker: none waits for one, and 200 thousand are not queued
_MOST: Final = 16
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")


class WorkerDied(VipLlavaError):
    """A worker process was ended from outside."""


def run_jobs(
    work: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    num_workers: int | None,
    *,
    ordered: bool = False,
) -> Generator[_Result]:
    """Yield results of jobs that run in processes.

    Args:
        work: a function of a module, or an object that can be pickled: each process gets it once.
        jobs: its arguments, read as far as the workers get.
        num_workers: processes, of which only those start that get a job; 0 works in this one, in
            the jobs' order. None takes one per core that this process may use, at most 16.
        ordered: yield in the jobs' order instead of as they come.

    Raises:
        WorkerDied: a worker was killed, for want of memory most likely.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(_MOST, cores or 1)
    if num_workers < 0:
        raise VipLlavaError(f"num_workers is {num_workers}; expected 0 or more")
    if num_workers == 0:
        yield from map(work, jobs)
        return
    # Not forked: threads (torch's, a progress bar's) do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (pickle.dumps(work),))
    try:
        yield from _in_pool(pool, _call, jobs, num_workers, ordered)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was ended from outside, for want of memory most likely; run the "
            "same command again with fewer workers (num_workers=)"
        ) from error


def run_threads(
    work: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    num_threads: int,
    *,
    ordered: bool = False,
) -> Generator[_Result]:
    """Yield results of jobs that run in threads, as :func:`run_jobs`; at least one thread."""
    num_threads = max(1, num_threads)
    yield from _in_pool(ThreadPoolExecutor(num_threads), work, jobs, num_threads, ordered)


def threads_beside_a_loop(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return threads for the blocking work of an event loop, which are the caller's to shut down.

    They are not the loop's own (of ``asyncio.to_thread``): for those it waits when it ends, and
    anybody may fill them. What is handed in has to be bounded by who hands it in.

    Args:
        num_threads: jobs that run at the same time.
        name: of the threads, for stacks.
    """
    return ThreadPoolExecutor(num_threads, name)


def run_tasks(
    shared: AbstractAsyncContextManager[_Shared],
    work: Callable[[_Shared, _Job], Coroutine[Any, Any, _Result]],
    jobs: Iterable[_Job],
    num_tasks: int,
) -> Generator[_Result]:
    """Yield results of jobs that run as tasks of one event loop, in a thread, as they come.

    The first error, of a job or of reading the jobs, ends it once what has begun is done and
    yielded; leaving the generator ends what runs at once.

    Args:
        shared: what the tasks use together, e.g. connections; entered and left in the loop.
        work: is called with that and a job.
        jobs: read in the caller's thread, one when a task is free.
        num_tasks: how many run at once.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="run_tasks", daemon=True)
    thread.start()

    def start(job: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(job, loop)

    try:
        entered = start(_call_async(shared.__aenter__)).result()
        try:
            yield from _tasks_results(lambda job: start(work(entered, job)), jobs, num_tasks)
        finally:
            start(_cancel_the_others()).result()
            start(_call_async(shared.__aexit__, None, None, None)).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _tasks_results(
    start: Callable[[_Job], Future[_Result]], jobs: Iterable[_Job], num_tasks: int
) -> Generator[_Result]:
    pending: set[Future[_Result]] = set()
    fault: BaseException | None = None
    waiting = iter(jobs)
    more = True
    while True:
        while more and fault is None and len(pending) < num_tasks:
            try:
                pending.add(start(next(waiting)))
            except StopIteration:
                more = False
            except Exception as error:  # noqa: BLE001 - raised below, after what has begun
                fault = error
        if not pending:
            break
        done, pending = wait(pending, None, FIRST_COMPLETED)
        for each in done:
            error = each.exception()
            if error is None:
                yield each.result()
            else:
                fault = fault or error
    if fault is not None:
        raise fault


async def _call_async(function: Callable[..., Any], *args: Any) -> Any:
    return await function(*args)


async def _cancel_the_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _in_pool(
    pool: Executor,
    work: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    num_workers: int,
    ordered: bool,
) -> Generator[_Result]:
    """The first error ends it; what has not begun by then is left."""
    pending: list[Future[_Result]] = []

    def take() -> _Result:
        first = pending[0] if ordered else wait(pending, None, FIRST_COMPLETED).done.pop()
        pending.remove(first)
        return first.result()

    try:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) >= _IN_FLIGHT * num_workers:
                yield take()
        while pending:
            yield take()
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]
"""What this process does, if :func:`run_jobs` started it."""


def _start_worker(work: bytes) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the jobs
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot tell; without this its workers would wait for ever.
    threading.Thread(target=follow, daemon=True).start()
    _work = pickle.loads(work)  # only now: its imports may take seconds


def _call(job: Any) -> Any:
    return _work(job)
