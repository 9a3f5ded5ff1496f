"""What every engine understands: requests with their own sampling in, a stream of deltas out.

:class:`GenerationEngine` has three implementations: a model in this process
(:mod:`vipllava.inference.local_engine`), an OpenAI-compatible server
(:mod:`vipllava.inference.openai_engine`), and processes with a device each
(:mod:`vipllava.inference.worker_pool`). Python, terminal, server, page and evaluation know the
protocol alone.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from vipllava.types import Request, VipLlavaError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""``stop``: the model ended, or a stop string was met; ``length``: ``max_new_tokens`` were."""

MOST_STOPS: Final = 16
"""Stop strings of one request."""
LONGEST_STOP: Final = 256
"""Letters of one stop string."""
MOST_LOGPROBS: Final = 20
"""Alternatives per token whose log probabilities can be asked for, as OpenAI's limit."""
LARGEST_SEED: Final = 2**63 - 1


class SamplingError(VipLlavaError):
    """A sampling option has a value that means nothing; ``option`` is its name."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(f"{option}={value!r}: expected {expected}")
        self.option = option

    def at(self, where: object) -> SamplingError:
        """Return the same error with a place in front of its message."""
        placed = SamplingError(self.option, None, "")
        placed.args = (f"{where}: {self}",)
        return placed


class PromptTooLong(VipLlavaError):
    """A conversation and its answer do not fit into the model's positions.

    Args:
        message: for people.
        room: positions that the conversation leaves to the answer; 0 if it does not fit itself.
    """

    def __init__(self, message: str, room: int = 0) -> None:
        super().__init__(message)
        self.room = room


class EngineStopped(VipLlavaError):
    """The engine was closed, or its model failed for good; nothing is answered any more."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answer of one request is chosen.

    Raises:
        SamplingError: a value means nothing; names the option, its value and what is expected.
    """

    max_new_tokens: int = 512  # longest answer, tokens
    temperature: float = 0.0  # 0 is greedy: always the likeliest token
    top_p: float = 1.0  # least share of probability that is drawn from
    top_k: int = 0  # so many of the likeliest tokens are drawn from; 0 for all
    seed: int | None = None  # of the draws; None takes another one each time
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    num_beams: int = 1  # above 1: beam search, which neither draws nor streams
    logprobs: int | None = None  # alternatives per token in deltas; None for no log probabilities

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        self._check_int("max_new_tokens", 1, 2**31 - 1)
        self._check_int("top_k", 0, 2**31 - 1)
        self._check_int("num_beams", 1, 16)
        self._check_number("temperature", 0.0, 100.0)
        self._check_number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise SamplingError("top_p", self.top_p, "a share above 0, at most 1")
        if self.seed is not None:
            self._check_int("seed", -LARGEST_SEED - 1, LARGEST_SEED)
        if self.logprobs is not None:
            self._check_int("logprobs", 0, MOST_LOGPROBS)
        stop: Any = self.stop
        if not isinstance(stop, tuple) or not all(
            isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in stop
        ):
            raise SamplingError("stop", stop, f"texts of 1 to {LONGEST_STOP} letters")
        if len(stop) > MOST_STOPS:
            raise SamplingError("stop", len(stop), f"at most {MOST_STOPS} texts")
        if self.num_beams > 1 and (self.temperature > 0 or self.logprobs is not None):
            raise SamplingError(
                "num_beams", self.num_beams, "1 with a temperature or with log probabilities"
            )

    def _check_int(self, name: str, least: int, most: int) -> None:
        value: Any = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            raise SamplingError(name, value, f"a whole number from {least} to {most}")

    def _check_number(self, name: str, least: float, most: float) -> None:
        value: Any = getattr(self, name)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fine or not math.isfinite(value) or not least <= value <= most:
            raise SamplingError(name, value, f"a number from {least:g} to {most:g}")

    @property
    def is_greedy(self) -> bool:
        """Whether the same question has the same answer each time."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One question to an engine; ``request.key`` names it in deltas, errors and :meth:`cancel`."""

    request: Request
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer and how likely it was, natural logarithm."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()  # the likeliest tokens at this place and theirs


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost, tokens."""

    prompt_tokens: int  # those of the image included
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one answer.

    The texts of one key, joined, are the answer. The last delta of a key, and no other, has a
    ``finish_reason``; nothing of that key comes behind it.
    """

    key: str  # of the request
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # with the last delta, where it is known
    # With ``error`` as finish reason: what a person can act on; nobody else's answer suffers.
    error: VipLlavaError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class GenerationEngine(Protocol):
    """Answers conversations whose images carry their marks already.

    Used from one event loop. What a request did wrong is a delta with ``error``, so that the others
    go on; only an engine that answers nobody any more raises.
    """

    @property
    def max_positions(self) -> int | None:
        """Ids that a prompt and its answer may have together; None if the engine does not say."""
        ...

    def generate(self, requests: Sequence[Generation]) -> AsyncGenerator[Delta]:
        """Yield the deltas of all requests as they come, those of one request in order.

        Closing the stream (``aclose``) cancels what still runs.

        Args:
            requests: each with a key of its own; the key must not be among those that run.

        Raises:
            EngineStopped: nobody answers any more.
            VipLlavaError: two requests have one key.
        """
        ...

    def cancel(self, key: str) -> None:
        """End a request; its last delta says ``cancelled``. A key that does not run is ignored."""
        ...

    async def close(self) -> None:
        """End what runs and give back memory; safe to call twice."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the deltas of one key, joined."""

    text: str
    finish_reason: FinishReason
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


def call_it(error: VipLlavaError, key: str, name: str) -> VipLlavaError:
    """Have the error of a request call it as a person does, not by its key; returns the error."""
    text = str(error).replace(f"request {key!r}", name)
    if text != str(error):
        error.args = (text, *error.args[1:])
    return error


async def collect(engine: GenerationEngine, requests: Sequence[Generation]) -> list[Answer]:
    """Return whole answers in the requests' order.

    Raises:
        VipLlavaError: what a request did wrong, of the first one that did.
    """
    texts: dict[str, list[str]] = {each.request.key: [] for each in requests}
    logprobs: dict[str, list[TokenLogprob]] = {each.request.key: [] for each in requests}
    done: dict[str, Answer] = {}
    async for delta in engine.generate(requests):
        if delta.error is not None:
            raise delta.error
        texts[delta.key].append(delta.text)
        logprobs[delta.key].extend(delta.logprobs)
        if delta.finish_reason is not None:
            text = "".join(texts[delta.key])
            found = tuple(logprobs[delta.key])
            done[delta.key] = Answer(text, delta.finish_reason, delta.usage, found)
    return [done[each.request.key] for each in requests]
