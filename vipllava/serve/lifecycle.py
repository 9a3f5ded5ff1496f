"""What ends a request: its deadline, its client that leaves, the end of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from starlette.types import Receive

from vipllava.serve.errors import ApiError


class Lifecycle:
    """Which requests run, and whether the server is ending."""

    def __init__(self) -> None:
        self.ending = False  # new requests are refused
        self.cut_off = False  # those that run are ended, too
        self.num_running = 0
        self._timeouts: set[asyncio.Timeout] = set()

    def check(self) -> None:
        """Refuse a request while the server is ending.

        Raises:
            ApiError: 503.
        """
        if self.ending:
            raise _ending()

    @contextmanager
    def running(self) -> Generator[None]:
        """Count a request; the end of the server waits for it.

        Raises:
            ApiError: 503; the server is ending.
        """
        self.check()
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    @asynccontextmanager
    async def within(self, deadline: float, deadline_s: float) -> AsyncGenerator[None]:
        """Bound a wait.

        Args:
            deadline: when it ends, time of the event loop.
            deadline_s: the whole time of the request, for people.

        Raises:
            ApiError: 504, or 503 if it was cut off by the end of the server.
        """
        timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout:
                if self.cut_off:
                    raise _ending()
                self._timeouts.add(timeout)
                try:
                    yield
                finally:
                    self._timeouts.discard(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            if self.cut_off:
                raise _ending() from None
            raise ApiError(
                504, f"the request was not answered within {deadline_s:g} s: shorten it, or ask "
                "again later", code="deadline_exceeded",
            ) from None  # fmt: skip

    def cut(self) -> None:
        """End what runs."""
        self.cut_off = True
        now = asyncio.get_running_loop().time()
        for timeout in self._timeouts:
            timeout.reschedule(now)


def _ending() -> ApiError:
    return ApiError(503, "the server is ending", code="ending", retry_after_s=5)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do what a client waits for, and stop when it leaves; return whether it was done.

    Args:
        receive: of the request, whose body has been read.
        work: answers it; cancelled when the client has left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        for each in (watcher, task):
            each.cancel()
        with suppress(asyncio.CancelledError, ApiError):
            await task


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
