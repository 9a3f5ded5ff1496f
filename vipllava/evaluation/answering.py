"""What a benchmark needs of a model: texts in, texts out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from vipllava.inference.engine import Request

_BATCHES_AT_ONCE: Final = 16
"""Enough for the engine to put questions of similar length together, few enough to hold."""


class Answerer(Protocol):
    """Answers questions; :class:`vipllava.inference.engine.Engine` does, and so can a fake."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request, in their order."""
        ...


def answer_all(
    answerer: Answerer, requests: Iterable[Request], *, max_new_tokens: int, batch_size: int
) -> Iterator[tuple[Request, str]]:
    """Yield every request with its answer, in order.

    Requests are drawn a few batches at a time, so that a benchmark of many pictures never holds
    them all.
    """
    pending = iter(requests)
    while chunk := list(itertools.islice(pending, _BATCHES_AT_ONCE * batch_size)):
        texts = answerer.answer(chunk, max_new_tokens=max_new_tokens, batch_size=batch_size)
        yield from zip(chunk, texts, strict=True)
