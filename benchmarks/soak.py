"""Clients that ask, stream, leave and send nonsense, for minutes; what must hold at the end.

Every request that was not given up has its whole answer, the same as when nobody else asked;
nonsense is refused with a status of 4xx; the server's memory is flat; no request stays open.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import psutil

from benchmarks.served import (
    CHAT,
    JSON,
    Body,
    Heard,
    Served,
    events,
    hear,
    name_of,
    open_session,
    questions,
    to_stream,
)

CLIENTS: Final = 16
FLAT: Final = 1.05
"""Memory of the last third over that of the first: at most."""
NUM_QUESTIONS: Final = 24
_WARM_UP_S: Final = 30.0  # half of the time at most: heaps and caches grow to what they need
_SETTLES_S: Final = 30.0
_METRIC: Final = re.compile(r"^vipllava_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass
class Found:
    """What happened.

    Attributes:
        done: how often each kind of request had what it should have.
        wrong: what should not have happened, in words.
        memory_mib: of the server and its processes, each with the second it was taken.
        open_at_end: requests that the server still counts.
    """

    done: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    memory_mib: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    open_at_end: float = 0.0

    @property
    def thirds(self) -> tuple[float, float]:
        """Median memory of the first and of the last third, MiB, after the warm-up."""
        warm = min(_WARM_UP_S, self.memory_mib[-1][0] / 2)
        kept = [mib for second, mib in self.memory_mib if second >= warm]
        third = max(1, len(kept) // 3)
        return median(kept[:third]), median(kept[-third:])

    @property
    def faults(self) -> list[str]:
        """Everything that does not hold."""
        first, last = self.thirds
        faults = list(self.wrong)
        if last > FLAT * first:
            faults.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
        if self.open_at_end:
            faults.append(f"{self.open_at_end:g} requests are still open")
        return faults

    def row(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        first, last = self.thirds
        row: dict[str, Any] = {name: self.done[name] for name in _KINDS}
        return row | {
            "told to wait": self.done["told to wait"],
            "first_mib": first,
            "last_mib": last,
            "ratio": last / first,
            "open": self.open_at_end,
            "wrong": len(self.wrong),
        }


async def soak(
    server: Served, data_root: Path, seconds: float, *, clients: int = CLIENTS, seed: int = 0
) -> Found:
    """Load a server and return what happened.

    Args:
        server: with one model.
        data_root: where the sample world is.
        seconds: how long new requests are sent.
        clients: at once.
        seed: of what each of them does next.
    """
    found = Found()
    bodies = _questions(data_root, await asyncio.to_thread(name_of, server))
    async with open_session(server.address) as session:
        quiet = [await hear(session, to_stream(body)) for body in bodies]
        for each in quiet:
            if each.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"no whole answer from a quiet server: {each}")
        began = time.monotonic()
        stop = began + seconds
        watching = asyncio.create_task(_watch(server, began, found))
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                client = _Client(
                    server, session, bodies, quiet, found, random.Random(f"{seed}/{number}")
                )
                group.create_task(client.work(stop))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        found.open_at_end = await _open_requests(server)
        again = [await hear(session, to_stream(body)) for body in bodies]
        for before, after in zip(quiet, again, strict=True):
            if before.text != after.text:
                found.wrong.append(f"{before.text!r} at first, {after.text!r} at the end")
    return found


def _questions(data_root: Path, name: str) -> list[Body]:
    """Return short and long ones, each about an image of its own."""
    found = [
        questions(data_root, NUM_QUESTIONS, max_tokens=tokens, caption=tokens > 2)
        for tokens in (2, 12, 32)
    ]
    return [found[n % 3][n] | {"model": name} for n in range(NUM_QUESTIONS)]


async def _watch(server: Served, began: float, found: Found) -> None:
    process = psutil.Process(server.pid)
    while True:
        size = 0
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                size += each.memory_info().rss
        found.memory_mib.append((time.monotonic() - began, size / 2**20))
        await asyncio.sleep(0.5)


async def _open_requests(server: Served) -> float:
    """Return how many requests the server counts as open, once it has had time to notice."""
    deadline = time.monotonic() + _SETTLES_S
    while True:
        values = _METRIC.findall(await asyncio.to_thread(server.get, "/metrics"))
        if not values:
            raise RuntimeError("/metrics does not say how many requests are open")
        num_open = sum(map(float, values))
        if not num_open or time.monotonic() > deadline:
            return num_open
        await asyncio.sleep(0.2)


@dataclass
class _Client:
    """One of those who ask."""

    server: Served
    session: aiohttp.ClientSession
    bodies: Sequence[Body]
    quiet: Sequence[Heard]
    found: Found
    chance: random.Random

    async def work(self, stop: float) -> None:
        """Do one thing after the other until the time is over."""
        names, weights = zip(*_KINDS.items(), strict=True)
        while time.monotonic() < stop:
            (kind,) = self.chance.choices(names, weights)
            do: Callable[[], Awaitable[None]] = getattr(self, kind.replace(" ", "_"))
            try:
                await do()
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                self.found.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            else:
                self.found.done[kind] += 1

    async def stream(self) -> None:
        """Read a streamed answer to its end."""
        body, quiet = self._question()
        while True:
            heard = await hear(self.session, to_stream(body))
            if heard.status != 429:
                break
            await self._wait_as_told()
        if (heard.text, heard.finish_reason) != (quiet.text, quiet.finish_reason):
            self.found.wrong.append(f"stream: {heard} instead of {quiet.text!r}")

    async def ask(self) -> None:
        """Wait for a whole answer."""
        body, quiet = self._question()
        while True:
            async with self.session.post(CHAT, json=body) as reply:
                status, said = reply.status, await reply.json()
            if status != 429:
                break
            await self._wait_as_told()
        choice = said["choices"][0] if status == 200 else said
        if status != 200 or choice["message"]["content"] != quiet.text:
            self.found.wrong.append(f"ask: {status} {choice} instead of {quiet.text!r}")

    async def leave_stream(self) -> None:
        """Read some of a stream, and go."""
        body, _ = self._question()
        async with self.session.post(CHAT, data=to_stream(body), headers=JSON) as reply:
            left = self.chance.randint(0, 6)
            async for _ in events(reply):
                if not left:
                    break
                left -= 1
            reply.close()

    async def leave(self) -> None:
        """Ask for a whole answer, and go before it comes."""
        body, _ = self._question()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.chance.uniform(0.0, 0.3)):
                async with self.session.post(CHAT, json=body) as reply:
                    await reply.read()

    async def hang(self) -> None:
        """Send half a request, and go after a while."""
        body, _ = self._question()
        said = json.dumps(body).encode()
        where = urlsplit(self.server.address)
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(said)}\r\n\r\n".encode() + said[: len(said) // 2])
        await writer.drain()
        await asyncio.sleep(self.chance.uniform(0.0, 1.0))
        writer.close()

    async def nonsense(self) -> None:
        """Send what no server can answer."""
        body, _ = self._question()
        name = self.chance.choice(list(_NONSENSE))
        data = _NONSENSE[name](body)
        async with self.session.post(CHAT, data=data, headers=JSON) as reply:
            said = await reply.text()
            if not 400 <= reply.status < 500:
                self.found.wrong.append(f"nonsense ({name}): {reply.status} {said[:200]}")

    def _question(self) -> tuple[Body, Heard]:
        number = self.chance.randrange(len(self.bodies))
        return self.bodies[number], self.quiet[number]

    async def _wait_as_told(self) -> None:
        self.found.done["told to wait"] += 1
        await asyncio.sleep(self.chance.uniform(0.2, 1.0))


_KINDS: Final = {
    "stream": 30, "ask": 30, "leave stream": 15, "leave": 10, "hang": 2, "nonsense": 13,
}  # fmt: skip
"""What a client does, and how often of a hundred times."""


def _with(**changes: Any) -> Callable[[Body], bytes]:
    return lambda body: json.dumps(body | changes).encode()


def _region(**fields: Any) -> Callable[[Body], bytes]:
    return _with(regions=[{"shape": "rectangle", "box": [1, 2, 30, 40]} | fields])


def _image(url: str) -> Callable[[Body], bytes]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return _with(messages=[{"role": "user", "content": parts}])


_NONSENSE: Final[dict[str, Callable[[Body], bytes]]] = {
    "no JSON": lambda body: json.dumps(body).encode()[:-1],
    "no messages": _with(messages=[]),
    "another role": _with(messages=[{"role": "wizard", "content": "Hello"}]),
    "another model": _with(model="another"),
    "temperature below 0": _with(temperature=-1),
    "too long": _with(messages=[{"role": "user", "content": "word " * 20_000}], regions=[]),
    "a region outside": _region(box=[5000, 5000, 6000, 6000]),
    "an unknown colour": _region(colour="infra-red"),
    "an unknown field": _region(size=3),
    "a place that is no number": _region(box=[1, 2, float("nan"), 4]),
    "many regions": _with(regions=[{"shape": "rectangle", "box": [1, 2, 30, 40]}] * 10_000),
    "no image in it": _image("data:image/png;base64,aGVsbG8="),
    "no base64": _image("data:image/png;base64,%%%"),
    "an address": _image("http://127.0.0.1:1/picture.png"),
    "a file": _image("file:///etc/passwd"),
}
"""What is refused; all of it names its field."""
