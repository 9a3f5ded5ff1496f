"""What a benchmark needs of a model: texts in, texts out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Protocol

from vipllava.evaluation.bench import Answered, Asked, Item
from vipllava.types import Request

_BATCHES_AT_ONCE: Final = 16
"""Enough for the engine to put questions of similar length together, few enough to hold."""


class Answerer(Protocol):
    """Answers questions; :class:`vipllava.inference.engine.Engine` does, and so can a fake."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request, in their order."""
        ...


def ask_all(
    asked: Iterable[Asked[Item]], answerer: Answerer, *, max_new_tokens: int, batch_size: int
) -> list[Answered[Item]]:
    """Return every item with its answers, in order.

    Requests are drawn a few batches at a time, so that a benchmark of many images never holds them
    all.
    """
    items: list[tuple[Item, list[str], str]] = []

    def requests() -> Iterator[Request]:
        for each in asked:
            key = next(iter(each.requests.values())).key
            items.append((each.item, list(each.requests), key))
            yield from each.requests.values()

    pending, texts = requests(), list[str]()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    while chunk := list(islice(pending, _BATCHES_AT_ONCE * batch_size)):
        texts += answerer.answer(chunk, **settings)
    said = iter(texts)
    return [
        Answered(key, item, dict(zip(ways, islice(said, len(ways)), strict=True)))
        for item, ways, key in items
    ]
