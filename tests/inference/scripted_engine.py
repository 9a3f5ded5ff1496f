"""An engine that says what it was asked, word by word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from vipllava.inference.protocol import Delta, EngineStopped, Generation, Usage
from vipllava.types import VipLlavaError


@dataclass
class ScriptedEngine:
    """Says ``You asked: <the last turn>``; a question with ``fail`` fails, ``wait`` never ends."""

    max_positions: int | None = None
    asked: list[Generation] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    num_closed: int = 0

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        if self.num_closed:
            raise EngineStopped("the engine was closed")
        self.asked += requests
        keys = [each.request.key for each in requests]
        assert len(set(keys)) == len(keys)
        open_keys = dict.fromkeys(keys)
        try:
            for each in reversed(requests):  # not in the order of asking
                key, text = each.request.key, each.request.turns[-1].text
                if "fail" in text:
                    open_keys.pop(key)
                    error = VipLlavaError(f"request {key!r} failed")
                    yield Delta(key, finish_reason="error", error=error)
                    continue
                for word in f"You asked: {text}".split():
                    await asyncio.sleep(0)
                    yield Delta(key, f"{word} ")
                if "wait" in text:
                    await asyncio.Event().wait()
                open_keys.pop(key)
                yield Delta(key, "", "stop", Usage(7, 3))
        finally:
            self.cancelled += open_keys

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)

    async def close(self) -> None:
        self.num_closed += 1
