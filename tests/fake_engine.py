"""An engine without a model, for what is around engines: it does what a question's text says."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Sequence

from vipllava.inference.protocol import (
    Delta,
    EngineStopped,
    Generation,
    SamplingError,
    TokenLogprob,
    Usage,
)
from vipllava.types import ConfigError

logger = logging.getLogger(__name__)
MAX_POSITIONS = 77


def open_fake(device: str) -> FakeEngine:
    """Open the engine of a device, unless its name says otherwise."""
    if device == "missing":
        raise ConfigError("device='missing' is not there: use auto or cpu")
    if device == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if device == "slow":
        time.sleep(600)
    return FakeEngine(device)


class FakeEngine:
    """Answers ``device: text`` word by word, or does what the text says.

    ``die``, ``exit``: its process ends. ``wait``: it says ``on`` until it is cancelled.
    ``refuse``: an error of the request. ``stop``: the engine stops for good. ``defect``: an error
    that no engine raises. ``image``: the SHA-256 of the image. ``pid``, ``torch``, ``threads``,
    ``log``: of the process.
    """

    max_positions = MAX_POSITIONS

    def __init__(self, device: str) -> None:
        self.device = device
        self.cancelled: set[str] = set()

    async def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        for asked in requests:
            key, text = asked.request.key, asked.request.turns[-1].text
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif text == "exit":
                os._exit(3)
            elif text == "stop":
                raise EngineStopped("the fake engine has stopped")
            elif text == "defect":
                raise KeyError("a defect")
            elif text == "refuse":
                error = SamplingError("top_p", 7, "a share")
                yield Delta(key, finish_reason="error", error=error)
                continue
            while text == "wait" and key not in self.cancelled:
                yield Delta(key, "on ")
                await asyncio.sleep(0.01)
            if text == "wait":
                yield Delta(key, finish_reason="cancelled")
                continue
            for word in (f"{self.device}:", f" {self._said(asked, text)}"):
                yield Delta(key, word, logprobs=(TokenLogprob(word, -0.5),))
                await asyncio.sleep(0)
            tokens = len(text) + 4 * (asked.request.image is not None)
            yield Delta(key, finish_reason="stop", usage=Usage(tokens, 2))

    def _said(self, asked: Generation, text: str) -> str:
        if text == "image":
            assert asked.request.image is not None
            return hashlib.sha256(asked.request.image.tobytes()).hexdigest()
        if text == "log":
            logger.warning("said by %s", self.device)
        known = {
            "pid": str(os.getpid()),
            "torch": str("torch" in sys.modules),
            "threads": os.environ["OMP_NUM_THREADS"],
        }
        return known.get(text, text)

    def cancel(self, key: str) -> None:
        self.cancelled.add(key)

    async def close(self) -> None:
        pass
