"""A model in this process behind the protocol: questions from an event loop, deltas back to it.

::

    generate --encode (a thread of two)--> Job --Worker--> the model's thread
        ^------ deltas, one call a step -----Outbox--------------'

Two workers know one protocol: :mod:`vipllava.inference.micro_batches` anywhere, and beside it
:mod:`vipllava.inference.continuous` where its greedy answers are found to be the same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from typing import Final, Literal

from vipllava.files.pools import threads_beside_a_loop
from vipllava.inference.engine import Engine
from vipllava.inference.micro_batches import MicroBatches
from vipllava.inference.protocol import Delta, EngineStopped, Generation
from vipllava.inference.streams import Job, Outbox, Stream, Worker
from vipllava.types import ConfigError, VipLlavaError

logger = logging.getLogger(__name__)

Continuous = Literal["auto"] | bool
_ENCODERS: Final = 2  # threads: a picture takes a few milliseconds


class LocalEngine:
    """Answers with one model in this process; the model belongs to it until it is closed.

    Used from one event loop at a time. A request waits in the order of its coming; who has its
    answer makes room for the next.

    Args:
        engine: the model.
        max_batch_size: answers that run together.
        max_waiting: prompts of one call that are encoded and wait; the others' images are not
            looked at before.
        max_batch_tokens: see :class:`vipllava.inference.micro_batches.MicroBatches`.
        continuous: whether greedy answers are worked out by transformers' continuous batching, as
            :mod:`vipllava.inference.continuous` says. ``auto``: on CUDA, where a check of some
            seconds finds its answers equal to those of ``generate``; the log says which it is.

    Raises:
        ConfigError: a size is below 1.
        VipLlavaError: ``continuous=True``, and it cannot be had or answers otherwise.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 64,
        max_batch_tokens: int | None = None,
        continuous: Continuous = "auto",
    ) -> None:
        sizes = {"max_batch_size": max_batch_size, "max_waiting": max_waiting}
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
            raise ConfigError(f"{', '.join(wrong)}: must be at least 1")
        self._engine, self._max_waiting = engine, max_waiting
        self._outbox = Outbox()
        self._jobs: dict[str, Job] = {}  # that run
        self._tickets = itertools.count()
        self._worker = _open_worker(
            engine, self._outbox, max_batch_size, max_batch_tokens, continuous
        )
        self._encoders = threads_beside_a_loop(_ENCODERS, "vipllava-encode")
        self._finalizer = weakref.finalize(self, _end, self._worker, self._encoders, os.getpid())

    @property
    def max_positions(self) -> int:
        """Ids that a prompt and its answer may have together."""
        return self._engine.max_positions

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        """Yield the deltas of all requests as they come, those of one request in order.

        Closing the stream (``aclose``) cancels what still runs.

        Args:
            requests: each with a key of its own; the key must not be among those that run.

        Raises:
            EngineStopped: nobody answers any more.
            VipLlavaError: two requests have one key.
        """
        stream = Stream(asyncio.get_running_loop())
        self._outbox.open(stream)
        try:
            self._take(requests, stream)
            room = asyncio.Semaphore(self._max_waiting)
            feeding = asyncio.create_task(self._feed(requests, stream, room))
            begun: set[str] = set()
            try:
                while stream.jobs:
                    event = await stream.events.get()
                    if isinstance(event, EngineStopped):
                        raise event
                    if event.key not in begun:
                        begun.add(event.key)
                        room.release()
                    if event.finish_reason is not None:
                        del stream.jobs[event.key], self._jobs[event.key]
                    yield event
            finally:
                feeding.cancel()
        finally:
            self._outbox.close(stream)
            for key, job in stream.jobs.items():
                job.is_cancelled = True
                del self._jobs[key]
            if stream.jobs:
                self._worker.wake()

    def cancel(self, key: str) -> None:
        """End a request; its last delta says ``cancelled``. A key that does not run is ignored."""
        if (job := self._jobs.get(key)) is None:
            return
        job.is_cancelled = True
        if job.row is None:  # its turn to be encoded has not come
            _finish(job, Delta(key, finish_reason="cancelled"))
        else:
            self._worker.wake()

    async def close(self) -> None:
        """End what runs with EngineStopped and give back memory; safe to call twice."""
        self._outbox.end(EngineStopped("the engine was closed: open it again"))
        await asyncio.get_running_loop().run_in_executor(None, self._finalizer)
        self._engine.features.clear()

    def _take(self, requests: Sequence[Generation], stream: Stream) -> None:
        keys = [each.request.key for each in requests]
        twice = [key for key, count in Counter(keys).items() if count > 1 or key in self._jobs]
        if twice:
            raise VipLlavaError(f"key {twice[0]!r} names two requests: each needs one of its own")
        for key in keys:
            self._jobs[key] = stream.jobs[key] = Job(next(self._tickets), key, stream)

    async def _feed(
        self, requests: Sequence[Generation], stream: Stream, room: asyncio.Semaphore
    ) -> None:
        """Encode prompts and hand them to the worker; what is wrong with one is its own answer."""
        jobs = dict(stream.jobs)
        for asked in requests:
            await room.acquire()
            if self._outbox.failure is not None:  # which the stream has heard of
                return
            job = jobs[asked.request.key]
            try:
                if not job.is_cancelled:
                    prompt = await stream.loop.run_in_executor(
                        self._encoders, self._engine.prompt, asked
                    )
                if not job.is_cancelled:
                    job.row = self._engine.row(prompt)
                    self._worker.submit(job)
            except VipLlavaError as error:
                _finish(job, Delta(job.key, finish_reason="error", error=error))
            except Exception as error:  # an image that Pillow refuses, say: only this request's
                logger.exception("request %r cannot be encoded", job.key)
                said = f"request {job.key!r} cannot be encoded: {type(error).__name__}: {error}"
                _finish(job, Delta(job.key, finish_reason="error", error=VipLlavaError(said)))


def _finish(job: Job, delta: Delta) -> None:
    """End a request that no worker has; of its event loop."""
    if not job.is_done:
        job.is_done = True
        job.stream.events.put_nowait(delta)


def open_engine(
    engine: Engine, *, continuous: Continuous = "auto", max_batch_size: int = 16
) -> LocalEngine:
    """Return an engine over a model, in the way that suits its device."""
    return LocalEngine(engine, continuous=continuous, max_batch_size=max_batch_size)


def _open_worker(
    engine: Engine,
    outbox: Outbox,
    max_batch_size: int,
    max_batch_tokens: int | None,
    continuous: Continuous,
) -> Worker:
    def open_micro_batches() -> Worker:
        sizes = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        return MicroBatches(engine, outbox, **sizes)

    if continuous is False or (continuous == "auto" and engine.device.type != "cuda"):
        return open_micro_batches()
    from vipllava.inference.continuous import open_continuous

    try:
        worker = open_continuous(engine, outbox, max_batch_size, open_micro_batches)
    except VipLlavaError as error:
        if continuous is True:
            raise
        logger.warning("micro-batches instead of continuous batching: %s", error)
        return open_micro_batches()
    logger.info("continuous batching: its answers were found equal to those of generate()")
    return worker


def _end(worker: Worker, encoders: Executor, process: int) -> None:
    if os.getpid() != process:  # a fork, which has none of the threads
        return
    encoders.shutdown(wait=False, cancel_futures=True)
    worker.stop()
    worker.join()
