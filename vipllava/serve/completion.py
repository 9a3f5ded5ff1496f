"""Answers in the shapes of OpenAI's chat completions, whole or in chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vipllava.inference.protocol import TokenLogprob, Usage
from vipllava.serve.errors import json_bytes

DONE: Final = b"data: [DONE]\n\n"
_LEAST_LOGPROB: Final = -9999.0
"""In place of minus infinity, which JSON has not; OpenAI's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What all chunks of one answer have in common."""

    id: str
    model: str
    with_logprobs: bool
    with_usage: bool  # a last chunk has it, the others say that it is to come
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self,
        text: str,
        finish_reason: str,
        usage: Usage | None,
        logprobs: Sequence[TokenLogprob],
        extra: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Return a completion; ``extra`` becomes the message's ``vipllava``."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if extra is not None:
            message["vipllava"] = extra
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return self._start("chat.completion") | {
            "choices": [choice],
            "usage": usage_fields(usage),
        }

    def chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> bytes:
        """Return an event with a piece of the answer."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        found = self._start("chat.completion.chunk") | {"choices": [choice]}
        return event(found | {"usage": None} if self.with_usage else found)

    def last(self, usage: Usage | None) -> bytes:
        """Return the event with the usage."""
        return event(
            self._start("chat.completion.chunk") | {"choices": [], "usage": usage_fields(usage)}
        )

    def _start(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            _token(each.token, each.logprob)
            | {"top_logprobs": [_token(*pair) for pair in each.top]}
            for each in found
        ]
        return {"content": content, "refusal": None}


def event(value: object) -> bytes:
    """Return a server-sent event of JSON values."""
    return b"data: " + json_bytes(value) + b"\n\n"


def usage_fields(usage: Usage | None) -> dict[str, int] | None:
    """Return tokens as OpenAI counts them; None where the engine does not say."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _token(token: str, logprob: float) -> dict[str, Any]:
    finite = logprob if math.isfinite(logprob) else _LEAST_LOGPROB
    return {
        "token": token,
        "logprob": finite,
        "bytes": list(token.encode("utf-8", "replace")),
    }
