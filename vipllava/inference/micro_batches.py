"""Answers of one model, worked out by a thread that owns it: batches that rows join and leave.

Who came first is read first. What is read at once is bounded by rows, by tokens, and by the memory
that keys and values may come to take. Where a device runs out of memory all the same, the batch is
made smaller, once and for all, and the log says so.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections import deque
from functools import partial
from typing import Final

import torch

from vipllava.forecast.memory import machine_memory
from vipllava.inference.decoding import Row
from vipllava.inference.engine import PREFILL_TOKENS, Engine
from vipllava.inference.kv_slots import bytes_per_token
from vipllava.inference.protocol import EngineStopped
from vipllava.inference.streams import Job, Outbox
from vipllava.types import VipLlavaError, first_line

logger = logging.getLogger(__name__)

_MEMORY_SHARE: Final = 0.5  # of what is free, for keys and values; the rest for what comes and goes
_UNKNOWN_MEMORY: Final = 2**33  # taken to be free where a platform does not say


class MicroBatches:
    """The thread.

    Args:
        engine: nobody else uses its model meanwhile.
        outbox: takes the deltas.
        max_batch_size: rows that run together.
        max_batch_tokens: rows times the longest they may become; what half of the free memory
            holds, if not given. A single request may exceed it.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        *,
        max_batch_size: int = 16,
        max_batch_tokens: int | None = None,
    ) -> None:
        self._engine, self._outbox = engine, outbox
        self._max_rows = max_batch_size
        self._max_tokens = max_batch_tokens or affordable_tokens(engine)
        self._condition = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._looks_for_cancelled = self._is_stopping = False
        self._waiting: list[Job] = []  # a heap
        self._running: dict[Row, Job] = {}
        self._batch = engine.decoding()
        self._thread = threading.Thread(target=self._run, name="vipllava-model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a request whose prompt is encoded."""
        with self._condition:
            self._inbox.append(job)
            self._condition.notify()

    def wake(self) -> None:
        """Look at once for requests that were cancelled."""
        with self._condition:
            self._looks_for_cancelled = True
            self._condition.notify()

    def stop(self) -> None:
        """End after the step that runs."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._has_work():
                self._work()
        except BaseException as error:  # whatever it was: nobody may wait for ever
            logger.exception("the thread of the model has failed")
            said = f"{type(error).__name__}: {first_line(error)}"
            self._outbox.end(EngineStopped(f"the engine's model has failed ({said}): start again"))
        finally:
            self._running.clear()
            self._waiting.clear()
            del self._batch

    def _has_work(self) -> bool:
        """Take in what has come, or wait for it; False when there is nothing more to do."""
        with self._condition:
            while not (self._inbox or self._looks_for_cancelled or self._is_stopping):
                if self._running or self._waiting:
                    return True
                self._batch.drop()
                self._condition.wait()
            for job in self._inbox:
                heapq.heappush(self._waiting, job)
            self._inbox.clear()
            if self._looks_for_cancelled:
                self._looks_for_cancelled = False
                self._cancel()
            return not self._is_stopping

    def _cancel(self) -> None:
        gone = [job for job in (*self._waiting, *self._running.values()) if job.is_cancelled]
        rows = {job.row for job in gone if job.row is not None}
        self._batch.leave(rows)
        for row in rows:
            row.end("cancelled")
            self._running.pop(row, None)
        self._waiting = [job for job in self._waiting if not job.is_cancelled]
        heapq.heapify(self._waiting)
        self._send(gone)

    def _work(self) -> None:
        if joining := self._admit():
            self._join(joining)
        if self._running:
            self._step()

    def _admit(self) -> list[Job]:
        """Take what is to be read now off those that wait, in their order."""
        joining: list[Job] = []
        running = len(self._running)
        longest = max((row.num_at_most for row in self._running), default=0)
        width = 0
        while self._waiting and running + len(joining) < self._max_rows:
            row = self._waiting[0].row
            assert row is not None
            if row.prompt.sampling.num_beams > 1:  # alone
                return joining or [heapq.heappop(self._waiting)]
            longest, width = max(longest, row.num_at_most), max(width, row.num_context)
            rows = running + len(joining) + 1
            if rows > 1 and rows * longest > self._max_tokens:
                break
            if joining and (len(joining) + 1) * width > PREFILL_TOKENS:
                break
            joining.append(heapq.heappop(self._waiting))
        return joining

    def _join(self, joining: list[Job]) -> None:
        jobs = {job.row: job for job in joining if job.row is not None}
        rows = list(jobs)
        if rows[0].prompt.sampling.num_beams > 1:
            work = partial(self._engine.search, rows, partial(self._is_ended, joining[0]))
        else:
            work = partial(self._batch.join, rows)
        try:
            advanced = work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._make_smaller(joining, len(self._running) + len(joining), error)
            return
        self._running |= jobs
        self._deliver(advanced)

    def _step(self) -> None:
        try:
            advanced = self._batch.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            num_rows = len(self._running)
            newest = sorted(self._running.values())[num_rows // 2 :]
            rows = {job.row for job in newest if job.row is not None}
            self._batch.leave(rows)
            for row in rows:
                del self._running[row]
            self._make_smaller(newest, num_rows, error)
            return
        self._deliver(advanced)

    def _make_smaller(self, jobs: list[Job], num_rows: int, error: BaseException) -> None:
        """Have jobs that did not fit wait for a smaller batch; one that ran alone is refused."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if num_rows > 1:
            self._max_rows = num_rows // 2
            logger.warning(
                "out of memory with %d answers at once: from now on at most %d (%s)",
                num_rows, self._max_rows, first_line(error),
            )  # fmt: skip
            for job in jobs:
                heapq.heappush(self._waiting, job)
            return
        for job in jobs:
            assert job.row is not None
            logger.warning("request %r does not fit into memory, even alone", job.key)
            usage = job.row.usage
            refused = VipLlavaError(
                f"request {job.key!r} does not fit into the memory of {self._engine.device}, even "
                f"alone, with {usage.prompt_tokens} tokens and {usage.completion_tokens} of its "
                "answer: shorten it, or load the model in fewer bits"
            )
            job.row.end("error", refused)
        self._send(jobs)

    def _deliver(self, advanced: list[Row]) -> None:
        jobs = [self._running[row] for row in advanced]
        for row in advanced:
            if row.finish_reason is not None:
                del self._running[row]
        self._send(jobs)

    def _send(self, jobs: list[Job]) -> None:
        deltas = ((job, job.delta()) for job in jobs)
        self._outbox.send((job, delta) for job, delta in deltas if delta is not None)

    def _is_ended(self, job: Job) -> bool:
        return job.is_cancelled or self._is_stopping


def affordable_tokens(engine: Engine) -> int:
    """Return the positions whose keys and values fit into half of the memory that is free."""
    model = engine.model
    if engine.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(engine.device)[0])
    else:
        used = sum(parameter.nbytes for parameter in model.parameters())
        free = (machine_memory() or _UNKNOWN_MEMORY) - used
    tokens = _MEMORY_SHARE * free / bytes_per_token(model.config.text_config, model.dtype)
    return max(1, int(tokens))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()  # the host's and Apple's allocator raise no class of their own
    return "out of memory" in said or "can't allocate memory" in said
