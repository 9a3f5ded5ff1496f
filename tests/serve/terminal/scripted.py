"""An engine that says what a test wants, letter by letter, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from vipllava.inference.protocol import Delta, Generation, Usage
from vipllava.types import Request, VipLlavaError

ENDLESS = "..."
"""An answer that goes on until it is cancelled, after these letters."""


def last_text(request: Request) -> str:
    return request.turns[-1].text


@dataclass
class ScriptedEngine:
    """Answers each question by a function of it.

    Attributes:
        answer: the text, an error, or ``ENDLESS``.
        asked: the requests, in their order.
        waits: is set when an endless answer has said its letters.
        cancelled: keys whose stream was closed or cancelled.
    """

    answer: Callable[[Request], str | VipLlavaError] = last_text
    asked: list[Generation] = field(default_factory=list)
    waits: threading.Event = field(default_factory=threading.Event)
    cancelled: list[str] = field(default_factory=list)
    max_positions: int | None = None

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        for each in requests:
            self.asked.append(each)
            key, text = each.request.key, self.answer(each.request)
            if isinstance(text, VipLlavaError):
                yield Delta(key, finish_reason="error", error=text)
                continue
            for letter in text:
                yield Delta(key, letter)
            if text == ENDLESS:
                self.waits.set()
                try:
                    while key not in self.cancelled:
                        await asyncio.sleep(0.01)
                except (asyncio.CancelledError, GeneratorExit):
                    self.cancelled.append(key)
                    raise
                yield Delta(key, finish_reason="cancelled")
                continue
            yield Delta(key, finish_reason="stop", usage=Usage(7, len(text)))

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)

    async def close(self) -> None:
        pass
