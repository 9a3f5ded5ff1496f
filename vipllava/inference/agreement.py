"""Whether two engines say the same: each question's greedy answers, and where they part."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from vipllava.inference.protocol import (
    Answer,
    Delta,
    Generation,
    GenerationEngine,
    Sampling,
    TokenLogprob,
)
from vipllava.types import Request, VipLlavaError

_AT_ONCE: Final = 16
"""Questions that both are asked at a time: so many images are held."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What two engines say to one question; blanks at the ends of texts count for nothing."""

    key: str
    question: str  # the last user turn
    ours: str
    theirs: str | None  # None if there is none, and ``failure`` says why
    failure: str | None = None
    letter: int | None = None  # the first that differs, from 0; None where the texts are equal
    token: int | None = None  # the first of ours that the other text lacks, from 0
    # How much likelier than the next token the model found it, natural logarithm: near 0 is a tie
    # that rounding decides.
    gap: float | None = None
    prompt_tokens: tuple[int | None, int | None] = (None, None)  # ours and theirs

    @property
    def is_equal(self) -> bool:
        """Whether both say the same."""
        return self.ours == self.theirs


async def compare(
    ours: GenerationEngine,
    theirs: GenerationEngine,
    requests: Iterable[Request],
    *,
    max_new_tokens: int = 64,
) -> AsyncGenerator[Compared]:
    """Ask both engines greedily and yield how they compare, in the requests' order.

    Args:
        ours: gives log probabilities, if it can, for the gap.
        theirs: what it does not answer is a failure of that question.
        requests: each with a key of its own; read a few at a time.
        max_new_tokens: longest answer, tokens.

    Raises:
        VipLlavaError: our engine does not answer.
    """
    pending = iter(requests)
    while chunk := list(islice(pending, _AT_ONCE)):
        wanted = Sampling(max_new_tokens=max_new_tokens, logprobs=2)
        mine = await _answers(ours, [Generation(each, wanted) for each in chunk])
        plain = Sampling(max_new_tokens=max_new_tokens)
        others = await _answers(theirs, [Generation(each, plain) for each in chunk])
        for request in chunk:
            answer = mine[request.key]
            if isinstance(answer, VipLlavaError):
                raise answer
            yield _compare(request, answer, others[request.key])


async def _answers(
    engine: GenerationEngine, asked: Sequence[Generation]
) -> dict[str, Answer | VipLlavaError]:
    deltas: dict[str, list[Delta]] = {each.request.key: [] for each in asked}
    async for delta in engine.generate(asked):
        deltas[delta.key].append(delta)
    return {key: _joined(found) for key, found in deltas.items()}


def _joined(deltas: Sequence[Delta]) -> Answer | VipLlavaError:
    last = deltas[-1]
    if last.error is not None:
        return last.error
    assert last.finish_reason is not None
    logprobs = tuple(each for delta in deltas for each in delta.logprobs)
    text = "".join(delta.text for delta in deltas)
    return Answer(text, last.finish_reason, last.usage, logprobs)


def _compare(request: Request, ours: Answer, theirs: Answer | VipLlavaError) -> Compared:
    question, mine = request.turns[-1].text, ours.text.strip()
    if isinstance(theirs, VipLlavaError):
        return Compared(request.key, question, mine, None, str(theirs))
    other = theirs.text.strip()
    counts = [None if each.usage is None else each.usage.prompt_tokens for each in (ours, theirs)]
    letter = token = gap = None
    if mine != other:
        pairs = enumerate(zip(mine, other, strict=False))
        shorter = min(len(mine), len(other))
        letter = next((number for number, (a, b) in pairs if a != b), shorter)
        if ours.logprobs or not mine:
            token, gap = _where_tokens_part(ours.logprobs, other)
    return Compared(
        request.key, question, mine, other, None, letter, token, gap, (counts[0], counts[1])
    )


def _where_tokens_part(tokens: Sequence[TokenLogprob], other: str) -> tuple[int, float | None]:
    """Return the number of our first token that another text lacks, and its gap."""
    said = ""
    for number, each in enumerate(tokens):
        said += each.token
        if not other.startswith(said.strip()):
            lesser = [logprob for token, logprob in each.top if token != each.token]
            gap = each.logprob - max(lesser) if lesser else None
            return number, gap if gap is not None and math.isfinite(gap) else None
    return len(tokens), None  # the other one went on
