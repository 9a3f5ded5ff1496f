"""Bounded admission: how many requests run and wait; who comes too many hears it at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from vipllava.serve.errors import ApiError

_LONGEST_RETRY_S: Final = 60.0
_NEWEST: Final = 0.2  # weight of the newest in the mean time that a request runs


class Admission:
    """Admits requests to one model; used from one event loop.

    Args:
        max_running: requests that run at a time.
        max_waiting: requests that wait for one of them to end, in the order they came.
        what: names it in refusals, e.g. "model `vip`".
    """

    def __init__(self, max_running: int, max_waiting: int, what: str) -> None:
        self.max_running, self.max_waiting, self.what = max_running, max_waiting, what
        self.admitted = 0
        self.running = 0
        self._slots = asyncio.Semaphore(max_running)  # first come, first served
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Requests that are here and do not run: their images are read, or others run."""
        return self.admitted - self.running

    @contextmanager
    def enter(self) -> Generator[Place]:
        """Take a place until the block ends.

        Raises:
            ApiError: 429; all places are taken. Says when to ask again.
        """
        most = self.max_running + self.max_waiting
        if self.admitted >= most:
            turns = (self.admitted + 1) / self.max_running
            raise ApiError(
                429,
                f"{self.what} has {self.admitted} requests and takes {most} at a time: ask again "
                "later",
                code="queue_full",
                retry_after_s=min(_LONGEST_RETRY_S, self._mean_s * turns),
            )
        self.admitted += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.admitted -= 1
            if place.started_at is not None:
                self.running -= 1
                self._slots.release()
                taken = time.monotonic() - place.started_at
                self._mean_s += _NEWEST * (taken - self._mean_s)


class Place:
    """One request's place among the admitted."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.started_at: float | None = None

    async def start(self) -> None:
        """Wait until it may run."""
        await self._admission._slots.acquire()
        self._admission.running += 1
        self.started_at = time.monotonic()
