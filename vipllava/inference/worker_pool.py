"""Several devices behind one engine: a process for each, a request goes to the least busy one."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from vipllava.files.pools import WorkerDied
from vipllava.inference.protocol import Delta, EngineStopped, Generation
from vipllava.inference.worker_process import UNPICKLABLE, Link, OpenEngine, run_worker
from vipllava.processes import signals_held
from vipllava.types import ConfigError, VipLlavaError

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "ended"]

_END_S: Final = 3.0
"""Seconds in which a worker ends by itself; then it is killed."""
_CANCEL_S: Final = 10.0
"""Seconds in which a worker says that a request has ended; one step of it takes less."""


def device_names(text: str) -> tuple[str, ...]:
    """Read devices: ``0,1`` is ``cuda:0`` and ``cuda:1``, other names stay.

    Raises:
        ConfigError: there is none, or a GPU twice.
    """
    names = [each.strip() for each in text.split(",")]
    found = tuple(f"cuda:{each}" if each.isdecimal() else each for each in names)
    twice = [name for name, uses in Counter(found).items() if uses > 1 and name != "cpu"]
    if not all(found) or twice:
        raise ConfigError(f"devices={text}: expected different ones, e.g. 0,1 or cuda:0,cuda:1")
    return found


@dataclass(eq=False)
class _Asked:
    """A request on its way."""

    generation: Generation
    deltas: asyncio.Queue[Delta]
    worker: _Worker | None = None  # None while it waits for one

    @property
    def key(self) -> str:
        return self.generation.request.key


@dataclass(eq=False)
class _Worker:
    """One process."""

    name: str  # of its device, for people
    device: str
    process: Any
    link: Link
    opened: asyncio.Future[None]
    num_deaths: int  # of its predecessors, since one of them has answered
    state: State = "starting"
    max_positions: int | None = None
    failure: VipLlavaError | None = None  # why its engine did not open
    running: dict[str, _Asked] = field(default_factory=dict[str, _Asked])
    outbox: queue.SimpleQueue[tuple[str, Any] | None] = field(default_factory=queue.SimpleQueue)
    receiver: threading.Thread | None = None  # ends when the process has ended; it alone waits


class WorkerPool:
    """Answers in processes, each with an engine on a device of its own.

    A worker that dies costs the requests that it was answering, which end with an error; it is
    started again. What waits for a worker goes on waiting.

    Args:
        open_engine: called with its device in each process; a function of a module or a value that
            can be pickled, e.g. :class:`vipllava.inference.engine_settings.LocalEngineSettings`.
        devices: as :func:`device_names` returns them; ``cpu`` may be there several times.
        max_restarts: deaths of one worker in a row, without an answer between them, after which its
            device is given up.
    """

    def __init__(
        self, open_engine: OpenEngine, devices: Sequence[str], *, max_restarts: int = 3
    ) -> None:
        if not devices:
            raise ConfigError("devices is empty: name at least one, e.g. cuda:0 or cpu")
        uses = Counter(devices)
        self._names = [
            device if uses[device] == 1 else f"{device} (worker {number})"
            for number, device in enumerate(devices)
        ]
        self._open_engine = open_engine
        self._devices = list(devices)
        self._max_restarts = max_restarts
        # Workers on the CPU share its cores; beside a GPU a process needs few.
        self._num_threads = max(1, (os.cpu_count() or 1) // len(devices))
        self._workers: list[_Worker] = []
        self._asked: dict[str, _Asked] = {}
        self._waiting: deque[_Asked] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_up = False
        self._is_closed = False

    @property
    def max_positions(self) -> int | None:
        """Ids of prompt and answer together, the least of the workers'; None before the start."""
        known = [each.max_positions for each in self._workers if each.max_positions is not None]
        return min(known, default=None)

    @property
    def states(self) -> dict[str, State]:
        """What each device does; ``ended`` is one that has been given up."""
        return {each.name: each.state for each in self._workers}

    async def start(self) -> None:
        """Start the processes and wait until all engines are open; what asks first does, too.

        Raises:
            VipLlavaError: an engine does not open, or its process dies; all are ended.
            EngineStopped: the pool was closed.
        """
        self._refuse_if_stopped()
        if not self._workers:
            # The kernel ends workers with the thread that started them: the loop's, not a helper's.
            self._loop = asyncio.get_running_loop()
            self._workers = [self._start_worker(number, 0) for number in range(len(self._devices))]
        if self._is_up:
            return
        try:
            await asyncio.gather(*(asyncio.shield(each.opened) for each in self._workers))
        except VipLlavaError:
            await self.close()
            raise
        self._is_up = True

    async def check(self) -> None:
        """Make sure that somebody answers.

        Raises:
            EngineStopped: the pool was closed, or all devices have been given up.
            VipLlavaError: no worker is ready yet, or again.
        """
        self._refuse_if_stopped()
        if not any(each.state == "ready" for each in self._workers):
            said = ", ".join(f"{name}: {state}" for name, state in self.states.items())
            raise VipLlavaError(f"no worker is ready ({said or 'not started'})")

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        """Yield the deltas of all requests as they come; see the protocol.

        Raises:
            EngineStopped: the pool was closed, or all devices have been given up.
            VipLlavaError: two requests have one key, or the engines do not open.
        """
        await self.start()
        keys = [each.request.key for each in requests]
        taken = [key for key in keys if key in self._asked or keys.count(key) > 1]
        if taken:
            raise VipLlavaError(f"several requests have the key {taken[0]!r}: give each its own")
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        for each in requests:
            asked = _Asked(each, deltas)
            self._asked[asked.key] = asked
            self._waiting.append(asked)
        self._hand_out()
        unfinished = set(keys)
        try:
            while unfinished:
                delta = await deltas.get()
                if delta.finish_reason is not None:
                    unfinished.discard(delta.key)
                yield delta
        finally:
            for key in unfinished:
                self.cancel(key)
            with suppress(TimeoutError):
                async with asyncio.timeout(_CANCEL_S):
                    while unfinished:
                        delta = await deltas.get()
                        unfinished -= {delta.key} if delta.finish_reason is not None else set()

    def cancel(self, key: str) -> None:
        """End a request; its last delta says ``cancelled``. A key that does not run is ignored."""
        asked = self._asked.get(key)
        if asked is None:
            return
        if asked.worker is not None:
            asked.worker.outbox.put(("cancel", key))
        else:
            self._waiting.remove(asked)
            self._deliver(Delta(key, finish_reason="cancelled"))

    async def close(self) -> None:
        """End what runs and the processes, within a few seconds; safe to call twice."""
        self._is_closed = True
        for key in list(self._asked):
            self._deliver(Delta(key, finish_reason="cancelled"))
        self._waiting.clear()
        for worker in self._workers:
            if worker.state == "starting":  # it hears nothing while it reads weights
                worker.process.terminate()
            worker.outbox.put(("end", None))
            worker.outbox.put(None)
        await asyncio.to_thread(_wait_for_all, list(self._workers))

    def _refuse_if_stopped(self) -> None:
        if self._is_closed:
            raise EngineStopped("the engine was closed")
        if self._workers and all(each.state == "ended" for each in self._workers):
            raise self._given_up()

    def _given_up(self) -> EngineStopped:
        names = ", ".join(self._names)
        return EngineStopped(f"no worker is left on {names}: the log says why each has ended")

    def _start_worker(self, number: int, num_deaths: int) -> _Worker:
        assert self._loop is not None
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        level = logging.getLogger().getEffectiveLevel()
        device = self._devices[number]
        process = context.Process(
            target=run_worker,
            args=(theirs, self._open_engine, device, level, self._num_threads),
            name=f"vipllava {device}",
            daemon=True,
        )
        worker = _Worker(
            self._names[number], device, process, Link(ours), self._loop.create_future(), num_deaths
        )
        with theirs, signals_held():
            process.start()
        threads = [
            threading.Thread(target=each, args=(worker, self._loop), daemon=True, name=process.name)
            for each in (self._send_all, self._receive_all)
        ]
        worker.receiver = threads[1]
        for thread in threads:
            thread.start()
        return worker

    def _send_all(self, worker: _Worker, loop: asyncio.AbstractEventLoop) -> None:
        """Send what is in a worker's outbox; in a thread, as an image takes a while."""
        while (message := worker.outbox.get()) is not None:
            try:
                packed = worker.link.pack(*message)
            except UNPICKLABLE as error:
                key = message[1].request.key
                said = f"request {key!r} cannot be handed to {worker.name}: {error}"
                last = Delta(key, finish_reason="error", error=VipLlavaError(said))
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._deliver, last)
                continue
            with suppress(OSError):  # it has ended, which the other thread tells
                worker.link.send_packed(packed)

    def _receive_all(self, worker: _Worker, loop: asyncio.AbstractEventLoop) -> None:
        """Hand what a worker says to the loop, and at last that it has ended."""
        with suppress(RuntimeError):  # the loop has ended
            with suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(self._hear, worker, *worker.link.receive())
            worker.process.join(_END_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            loop.call_soon_threadsafe(self._bury, worker)
        worker.outbox.put(None)
        worker.link.close()

    def _hear(self, worker: _Worker, word: str, value: Any) -> None:
        if word == "delta":
            if value.finish_reason in ("stop", "length"):
                worker.num_deaths = 0
            if isinstance(value.error, EngineStopped):  # of this worker only, which ends now
                worker.state = "starting"
                value = replace(value, error=WorkerDied(f"{worker.name}: {value.error}; ask again"))
            if value.key in worker.running:
                self._deliver(value)
        elif word == "log":
            logging.getLogger(value.name).handle(value)
        elif word == "ready":
            worker.state, worker.max_positions = "ready", value
            if not worker.opened.done():
                worker.opened.set_result(None)
            self._hand_out()
        else:
            worker.failure = value

    def _hand_out(self) -> None:
        """Give what waits to the ready workers with the fewest requests."""
        ready = [each for each in self._workers if each.state == "ready"]
        while ready and self._waiting:
            asked = self._waiting.popleft()
            worker = min(ready, key=lambda each: len(each.running))
            asked.worker = worker
            worker.running[asked.key] = asked
            worker.outbox.put(("ask", asked.generation))

    def _deliver(self, delta: Delta) -> None:
        asked = self._asked.get(delta.key)
        if asked is None:
            return
        if delta.finish_reason is not None:
            del self._asked[delta.key]
            if asked.worker is not None:
                del asked.worker.running[delta.key]
        asked.deltas.put_nowait(delta)

    def _bury(self, worker: _Worker) -> None:
        """End the requests of a worker that has ended, and start it again or give it up."""
        worker.state = "ended"
        how = str(worker.failure or _how_it_ended(worker.process.exitcode))
        if self._is_closed:
            if not worker.opened.done():
                worker.opened.cancel()
            return
        for key in list(worker.running):
            error = WorkerDied(f"{worker.name}: {how} while it answered; ask again")
            self._deliver(Delta(key, finish_reason="error", error=error))
        if not worker.opened.done() and not self._is_up:  # whoever starts the pool is told
            worker.opened.set_exception(
                worker.failure or WorkerDied(f"{worker.name}: {how} while it opened its model")
            )
            return
        number, num_deaths = self._workers.index(worker), worker.num_deaths + 1
        if worker.failure is None and num_deaths <= self._max_restarts:
            said = "%s: %s; started again (%d of %d)"
            logger.warning(said, worker.name, how, num_deaths, self._max_restarts)
            self._workers[number] = self._start_worker(number, num_deaths)
            return
        logger.error("%s: %s; this device is given up", worker.name, how)
        if all(each.state == "ended" for each in self._workers):
            while self._waiting:
                key, error = self._waiting.popleft().key, self._given_up()
                self._deliver(Delta(key, finish_reason="error", error=error))


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    of_memory = " (for want of memory most likely)" * (name == "SIGKILL")
    return f"its process was ended by {name}{of_memory}"


def _wait_for_all(workers: Sequence[_Worker]) -> None:
    ends = time.monotonic() + _END_S
    for worker in workers:
        assert worker.receiver is not None
        worker.receiver.join(max(0.0, ends - time.monotonic()))
        if worker.receiver.is_alive():
            worker.process.kill()
            worker.receiver.join()
