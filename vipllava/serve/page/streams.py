"""Several answers at once: one stream of what comes next of any of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from vipllava.inference.protocol import Delta, Generation, GenerationEngine
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)


class AnswerFailed(VipLlavaError):
    """A model broke off in a way that nobody expected; the log has the details."""


async def stream_together(
    asked: Sequence[tuple[GenerationEngine, Generation]], pause_s: float = 0.0
) -> AsyncGenerator[list[tuple[int, Delta]]]:
    """Yield what the engines say, as it comes; closing it cancels all of them.

    One that fails ends with a delta that says so, and the others go on.

    Args:
        asked: one engine and question per answer.
        pause_s: seconds between two lists at least: what a browser can draw.

    Yields:
        Pairs of the place in ``asked`` and the next delta of it.
    """
    arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

    async def follow(place: int, engine: GenerationEngine, generation: Generation) -> None:
        key, ended = generation.request.key, False
        error: VipLlavaError | None = None
        try:
            async with aclosing(engine.generate([generation])) as stream:
                async for delta in stream:
                    ended = ended or delta.finish_reason is not None
                    arrived.put_nowait((place, delta))
        except VipLlavaError as failure:
            error = failure
        except Exception:
            logger.exception("an answer broke off")
            error = AnswerFailed("the model broke off; the server's log says why")
        if not ended:
            error = error or AnswerFailed("the model ended without an answer")
            arrived.put_nowait((place, Delta(key, finish_reason="error", error=error)))

    tasks = [asyncio.create_task(follow(n, *pair)) for n, pair in enumerate(asked)]
    open_answers = len(tasks)
    try:
        while open_answers:
            batch = [await arrived.get()]
            while not arrived.empty():
                batch.append(arrived.get_nowait())
            open_answers -= sum(delta.finish_reason is not None for _, delta in batch)
            yield batch
            if open_answers and pause_s:
                await asyncio.sleep(pause_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
