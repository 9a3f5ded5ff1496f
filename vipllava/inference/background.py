"""An engine from plain code: its event loop runs in a thread, so a notebook's own is left alone."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from contextlib import aclosing
from typing import Any, Final, TypeVar

from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    Generation,
    GenerationEngine,
    call_it,
)
from vipllava.types import VipLlavaError

T = TypeVar("T")
_CLOSED: Final = "the model is closed: load it again"


class Background:
    """Runs one engine in a thread of its own, until it is closed or nobody knows it any more.

    Args:
        engine: belongs to this from now on.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.engine = engine
        self.process = os.getpid()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(loop,), daemon=True, name="vipllava-ask")
        thread.start()
        self._loop = loop
        self._end = weakref.finalize(self, _end, loop, thread, engine, self.process)
        # At the interpreter's end no executor works any more; the thread is a daemon.
        self._end.atexit = False

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine does in the thread; Ctrl-C cancels it.

        Raises:
            EngineStopped: it was closed.
            VipLlavaError: see :meth:`start`.
        """
        future = self.start(job)
        try:
            return future.result()
        except CancelledError:
            raise EngineStopped(_CLOSED) from None
        finally:
            future.cancel()

    def start(self, job: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the thread do a coroutine.

        Raises:
            EngineStopped: it was closed.
            VipLlavaError: this process is a fork, which has no such thread.
        """
        try:
            refuse_in_a_fork(self.process)
        except VipLlavaError:
            job.close()
            raise
        try:
            if self._end.alive:
                return asyncio.run_coroutine_threadsafe(job, self._loop)
        except RuntimeError as error:  # closed by another thread meanwhile
            job.close()
            raise EngineStopped(_CLOSED) from error
        job.close()
        raise EngineStopped(_CLOSED)

    def close(self) -> None:
        """End what runs and give back memory; safe to call twice."""
        self._end()


class Pieces(Generator[str, None, None]):
    """The deltas of one request as they come: an iterator over the pieces of its text.

    Closing it, or a ``with`` block's end, cancels what has not come.

    Args:
        background: whose engine is asked.
        generation: what it is asked.
    """

    def __init__(self, background: Background, generation: Generation) -> None:
        self._key = generation.request.key
        self._deltas: list[Delta] = []
        self._events: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
        self.has_ended = False
        self._process = background.process
        self._future = background.start(_pump(background.engine, generation, self._events.put))
        # What is dropped before its end is not worked out to its end.
        weakref.finalize(self, self._future.cancel).atexit = False

    def send(self, value: None, /) -> str:
        """Return the next piece; errors of the request are raised here."""
        while not self.has_ended:
            refuse_in_a_fork(self._process)
            event = self._events.get()
            if isinstance(event, BaseException):
                self.has_ended = True
                raise event
            if event.error is not None:
                self.has_ended = True
                raise call_it(event.error, self._key, "the question")
            self._deltas.append(event)
            if event.finish_reason is not None:
                self.has_ended = True
                self.end(self._deltas)
            if event.text:
                return event.text
        raise StopIteration

    def throw(self, *error: Any) -> str:
        """Cancel what has not come, and raise an error here."""
        self.close()
        raise error[0]

    def close(self) -> None:
        """Cancel what has not come."""
        if not self.has_ended:
            self.has_ended = True
            self._future.cancel()
            self.end(self._deltas)

    def end(self, deltas: list[Delta]) -> None:
        """Take all deltas once the last one has come, or once it is closed: what has come."""

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


async def _pump(
    engine: GenerationEngine,
    generation: Generation,
    put: Callable[[Delta | BaseException], None],
) -> None:
    try:
        async with aclosing(engine.generate([generation])) as deltas:
            async for delta in deltas:
                put(delta)
        put(EngineStopped("the engine ended without an answer's end"))
    except asyncio.CancelledError:
        put(EngineStopped(_CLOSED))
        raise
    except BaseException as error:  # noqa: BLE001  # raised where the pieces are read
        put(error)


def refuse_in_a_fork(process: int) -> None:
    """Raise VipLlavaError where this process is another one: a fork takes no threads along."""
    if os.getpid() != process:
        raise VipLlavaError(
            f"the model was loaded by process {process}, and this one is its fork, which has none "
            "of the model's threads: load the model here, or start processes by "
            'multiprocessing.get_context("spawn")'
        )


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _end(
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    engine: GenerationEngine,
    process: int,
) -> None:
    if os.getpid() != process:  # nobody is there who could end it, and the parent goes on
        return

    async def end() -> None:
        try:
            await engine.close()
        finally:
            loop.stop()

    ending = asyncio.run_coroutine_threadsafe(end(), loop)
    # The garbage collector may call this from any thread, the loop's own among them.
    if threading.current_thread() is not thread:
        thread.join()
        ending.result()
