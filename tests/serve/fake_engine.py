"""An engine that answers at once, or when it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from PIL import Image

from vipllava.inference.protocol import Delta, EngineStopped, Generation, TokenLogprob, Usage

PIECES = ("The ", "box ", "is ", "red.")


class FakeEngine:
    """Says `PIECES`; a question with "hold" gets the first of them, and the rest on release."""

    def __init__(
        self,
        max_positions: int | None = 512,
        pieces: Callable[[Generation], Sequence[str]] = lambda asked: PIECES,
    ) -> None:
        self.max_positions = max_positions
        self.pieces = pieces
        self.asked: list[Generation] = []
        self.left: list[str] = []  # keys whose stream was closed before its end
        self.running = 0
        self.most_running = 0
        self.released = threading.Event()
        self.fault: Exception | None = None  # in place of answers
        self.raises: Exception | None = None
        self.is_closed = False

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        (asked,) = requests
        key = asked.request.key
        self.asked.append(asked)
        if self.raises is not None:
            raise self.raises
        if self.fault is not None:
            yield Delta(key, finish_reason="error", error=self.fault)  # type: ignore[arg-type]
            return
        text = asked.request.turns[-1].text
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        whole = False
        try:
            pieces = self.pieces(asked)[: asked.sampling.max_new_tokens]
            for number, piece in enumerate(pieces):
                if number == ("holdfirst" not in text) and "hold" in text:
                    while not self.released.is_set():
                        await asyncio.sleep(0.002)
                if "slow" in text:
                    await asyncio.sleep(0.2)
                await asyncio.sleep(0)
                yield Delta(key, piece, logprobs=self._logprobs(asked, piece))
            is_cut = len(pieces) == asked.sampling.max_new_tokens
            usage = Usage(10 + 4 * (asked.request.image is not None), len(pieces))
            whole = True
            yield Delta(key, finish_reason="length" if is_cut else "stop", usage=usage)
        finally:
            self.running -= 1
            if not whole:
                self.left.append(key)

    def cancel(self, key: str) -> None:
        pass

    async def close(self) -> None:
        self.is_closed = True
        self.raises = EngineStopped("closed")

    @staticmethod
    def _logprobs(asked: Generation, piece: str) -> tuple[TokenLogprob, ...]:
        if asked.sampling.logprobs is None:
            return ()
        top = ((piece, -0.5), ("\U0001f600", float("-inf")))
        return (TokenLogprob(piece, -0.5, top[: asked.sampling.logprobs]),)


def picture(size: tuple[int, int] = (40, 30), colour: Any = (10, 120, 200)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    found = io.BytesIO()
    image.save(found, kind, **options)
    return found.getvalue()


def data_uri(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    data = base64.b64encode(encoded(image, kind, **options)).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def from_data_uri(uri: str) -> Image.Image:
    start, _, data = uri.partition(",")
    assert start == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def question(text: str, url: str | None = None) -> dict[str, Any]:
    """A user's message."""
    if url is None:
        return {"role": "user", "content": text}
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}
