"""Bodies of requests: how they arrive, how much memory they hold, and who reads them.

Whoever sends most of a body and then hangs holds memory that others need. So all bodies together,
and those of one address, have a part of it; where that is full, a body that stands still is left
for one that arrives.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from fastapi import Request

from vipllava.files.pools import threads_beside_a_loop
from vipllava.serve.errors import ApiError
from vipllava.serve.limits import Held, Memory, parse_json
from vipllava.serve.settings import MB, ServerSettings

T = TypeVar("T")
STALLED_S: Final = 1.0
"""Seconds after which a body that has not come further is left where others need its memory."""
_STEP: Final = 65_536  # bytes; less is not further
_READERS: Final = 2
_SMALL: Final = 32_768
"""Bytes of a body that is read at once: it takes milliseconds."""
_DRAIN_S: Final = 2.0
"""Seconds in which the rest of a body that is too large is read and dropped: a client that is still
sending hears no answer."""


class Bodies:
    """Takes the bodies of a server's requests; to be closed.

    Args:
        settings: limits of size and time.
        memory: of which all bodies may hold one half, and those of one address a quarter, but
            always one body.
    """

    def __init__(self, settings: ServerSettings, memory: Memory) -> None:
        self._settings, self._memory = settings, memory
        self._largest = int(settings.max_body_mb * MB)
        self._most = max(memory.size // 2, self._largest)
        self._share = max(memory.size // 4, self._largest)
        self._here: set[_Arriving] = set()
        self._of_address: Counter[str] = Counter()  # bytes
        self._total = 0
        self._readers = threads_beside_a_loop(_READERS, "body")

    def close(self) -> None:
        """Drop what waits, and wait for what runs."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    async def read(self, request: Request, check: Callable[[Any], T]) -> T:
        """Return what a check makes of a body's JSON values.

        Args:
            request: its body has not been read.
            check: raises ApiError of values that mean nothing; called in another thread where
                that takes longer.

        Raises:
            ApiError: 415 for another content type, 413 for a body that is too large, 408 for one
                that comes too slowly, 429 where the memory is full, 400 for no JSON: see
                :func:`vipllava.serve.limits.parse_json`; and what the check raises.
            ClientDisconnect: the client has left.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # With other types any web page could have a visitor's browser ask, without permission.
            raise ApiError(
                415,
                f"Content-Type is {kind[:100]!r}; expected application/json",
                code="unsupported_media_type",
                close=True,
            )
        address = request.client.host if request.client else ""
        with self._memory.hold() as held, self._arriving(address, held) as arriving:
            body = bytes(await self._whole(request, arriving))
            if len(body) <= _SMALL:
                return check(parse_json(body))
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, lambda: check(parse_json(body)))

    async def _whole(self, request: Request, arriving: _Arriving) -> bytearray:
        settings, most = self._settings, self._largest
        body = bytearray()
        too_large = int(request.headers.get("content-length", "0")) > most
        num_read = 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DRAIN_S if too_large else settings.body_timeout_s) as time:
                arriving.time = time
                async for chunk in request.stream():
                    num_read += len(chunk)
                    if num_read > most and not too_large:
                        too_large = True
                        time.reschedule(loop.time() + _DRAIN_S)
                    if too_large:
                        body.clear()
                        if num_read > 2 * most:
                            break
                    else:
                        self._take(arriving, len(chunk))
                        body += chunk
        except TimeoutError:
            if arriving.is_left:
                raise _left() from None
            if not too_large:
                raise ApiError(
                    408,
                    f"the body did not arrive within {settings.body_timeout_s:g} s",
                    code="body_too_slow",
                    close=True,
                ) from None
        finally:
            arriving.time = None
        if too_large:
            raise ApiError(
                413,
                f"the body has more than {settings.max_body_mb:g} MB, the limit: send a smaller "
                "image, e.g. as JPEG",
                code="request_too_large",
                close=True,
            )
        return body

    @contextmanager
    def _arriving(self, address: str, held: Held) -> Generator[_Arriving]:
        found = _Arriving(address, held)
        self._here.add(found)
        try:
            yield found
        finally:
            self._here.discard(found)
            self._count(found, -held.num_bytes)

    def _count(self, arriving: _Arriving, num_bytes: int) -> None:
        self._total += num_bytes
        self._of_address[arriving.address] += num_bytes
        if not self._of_address[arriving.address]:
            del self._of_address[arriving.address]

    def _take(self, arriving: _Arriving, num_bytes: int) -> None:
        """Take memory for what has come, of bodies that stand still if need be."""
        address = arriving.address
        if (missing := self._of_address[address] + num_bytes - self._share) > 0:
            same = [each for each in self._here if each.address == address]
            self._leave(same, missing, "the bodies from your address fill its share of the memory")
        if (missing := self._total + num_bytes - self._most) > 0:
            self._leave(self._here, missing, "the bodies that arrive fill the memory for them")
        if arriving.is_left:  # it was the slowest itself
            raise _left()
        arriving.held.take(num_bytes)
        self._count(arriving, num_bytes)
        arriving.advance()

    def _leave(self, group: Iterable[_Arriving], missing: int, why: str) -> None:
        """Leave those that have stood still longest, until enough is free.

        Raises:
            ApiError: 429; too few stand still.
        """
        late = asyncio.get_running_loop().time() - STALLED_S
        still = [each for each in group if each.time is not None and each.came_at < late]
        if sum(each.held.num_bytes for each in still) < missing:
            raise ApiError(429, f"{why}: ask again later", code="memory_full", retry_after_s=2,
                           close=True)  # fmt: skip
        for each in sorted(still, key=lambda each: each.came_at):
            if missing <= 0:
                break
            missing -= each.held.num_bytes
            self._count(each, -each.held.num_bytes)
            each.leave()


class _Arriving:
    """One body that arrives, or has arrived and is being read."""

    def __init__(self, address: str, held: Held) -> None:
        self.address, self.held = address, held
        self.time: asyncio.Timeout | None = None  # while it arrives
        self.is_left = False
        self.came_at = asyncio.get_running_loop().time()  # the last step
        self._next = _STEP

    def advance(self) -> None:
        """Note how far it is."""
        if self.held.num_bytes >= self._next:
            self._next = self.held.num_bytes + _STEP
            self.came_at = asyncio.get_running_loop().time()

    def leave(self) -> None:
        """Give its memory back, and end it."""
        self.is_left = True
        self.held.give_back(self.held.num_bytes)
        if self.time is not None and not self.time.expired():
            self.time.reschedule(asyncio.get_running_loop().time())
        self.time = None


def _left() -> ApiError:
    return ApiError(
        408, "the body stood still, and others needed its memory: send it again",
        code="body_too_slow", close=True,
    )  # fmt: skip
