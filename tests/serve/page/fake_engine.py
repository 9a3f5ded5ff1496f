"""Engines without a model: they say what a test wants, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from vipllava.inference.protocol import Delta, Generation, Usage
from vipllava.types import Request, VipLlavaError


@dataclass
class FakeEngine:
    """Answers with the pieces that ``say`` returns for a request.

    Attributes:
        say: the pieces; a VipLlavaError among them ends the answer.
        asked: the generations, in the order that they came.
        gate: while it is not set, an answer waits before its second piece.
        ended: the keys whose streams were closed or cancelled before their end.
    """

    say: Callable[[Request], Sequence[str | VipLlavaError]] = lambda request: ["yes"]
    asked: list[Generation] = field(default_factory=list)
    gate: asyncio.Event | None = None
    pause_s: float = 0.0
    ended: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    closed: bool = False

    @property
    def max_positions(self) -> int | None:
        return None

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        (generation,) = requests
        key = generation.request.key
        self.asked.append(generation)
        done = False
        try:
            for number, piece in enumerate(self.say(generation.request)):
                if isinstance(piece, VipLlavaError):
                    done = True
                    yield Delta(key, finish_reason="error", error=piece)
                    return
                if number and self.gate is not None:
                    while not self.gate.is_set() and key not in self.cancelled:
                        await asyncio.sleep(0.005)
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                if key in self.cancelled:
                    done = True
                    self.ended.append(key)
                    yield Delta(key, finish_reason="cancelled")
                    return
                yield Delta(key, piece)
            done = True
            yield Delta(key, finish_reason="stop", usage=Usage(10, 5))
        finally:
            if not done:
                self.ended.append(key)

    def cancel(self, key: str) -> None:
        self.cancelled.add(key)

    async def close(self) -> None:
        self.closed = True
