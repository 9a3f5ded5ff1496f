"""How answers come from the threads that work them out to the event loops that wait for them.

A thread never waits for who reads: what nobody has read yet is bounded by the answers' lengths.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Protocol

from vipllava.inference.decoding import Row
from vipllava.inference.protocol import Delta, EngineStopped

Event = Delta | EngineStopped


@total_ordering
@dataclass(slots=True, eq=False)
class Job:
    """One request that an engine has taken, from its coming to its last delta."""

    ticket: int  # who came first is answered first
    key: str
    stream: Stream
    row: Row | None = None  # once its prompt is encoded
    is_cancelled: bool = False  # to be ended as soon as its thread sees it
    is_done: bool = False  # its last delta was handed over

    def __lt__(self, other: Job) -> bool:
        return self.ticket < other.ticket

    def delta(self) -> Delta | None:
        """Return what is new of its answer; None where that is nothing."""
        row = self.row
        assert row is not None
        text, logprobs = row.take()
        if row.finish_reason is None:
            return Delta(self.key, text, logprobs=logprobs) if text or logprobs else None
        return Delta(self.key, text, row.finish_reason, row.usage, row.error, logprobs)


@dataclass(slots=True, eq=False)
class Stream:
    """What one call of ``generate`` reads."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue[Event])
    jobs: dict[str, Job] = field(default_factory=dict[str, Job])


class Outbox:
    """Hands deltas over; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self.failure: EngineStopped | None = None  # why nobody is answered any more

    def open(self, stream: Stream) -> None:
        """Have a stream hear of the end, too; raises EngineStopped where that has come."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._streams.add(stream)

    def close(self, stream: Stream) -> None:
        """Forget a stream."""
        with self._lock:
            self._streams.discard(stream)

    def send(self, deltas: Iterable[tuple[Job, Delta]]) -> None:
        """Hand deltas to who waits for them: one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = defaultdict(list)
        for job, delta in deltas:
            if not job.is_done:
                job.is_done = delta.finish_reason is not None
                by_loop[job.stream.loop].append((job.stream, delta))
        for loop, events in by_loop.items():
            _call(loop, events)

    def end(self, failure: EngineStopped) -> None:
        """End all streams with an error, these and those to come; the first reason stays."""
        with self._lock:
            self.failure = self.failure or failure
            streams = list(self._streams)
        for stream in streams:
            _call(stream.loop, [(stream, self.failure)])


def _call(loop: asyncio.AbstractEventLoop, events: list[tuple[Stream, Event]]) -> None:
    try:
        loop.call_soon_threadsafe(_put, events)
    except RuntimeError:  # the loop is closed: nobody waits
        for stream, _ in events:
            for job in stream.jobs.values():
                job.is_cancelled = True


def _put(events: list[tuple[Stream, Event]]) -> None:
    for stream, event in events:
        stream.events.put_nowait(event)


class Worker(Protocol):
    """Who works answers out, in threads of its own."""

    def submit(self, job: Job) -> None:
        """Take a request whose prompt is encoded; it waits behind those with lower tickets."""
        ...

    def wake(self) -> None:
        """Look at once for requests that were cancelled."""
        ...

    def stop(self) -> None:
        """End soon; what runs gets no last delta from here. Safe to call twice."""
        ...

    def join(self) -> None:
        """Wait until the threads have ended."""
        ...
