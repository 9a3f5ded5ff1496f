"""Choosing among wordings of equal meaning, and the constants checkpoints depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from vipllava.types import DraftTurn, Mention

LETTERS: Final = "ABCD"
# LLaVA-1.5's constants for short answers and for multiple choice.
SHORT_ANSWER: Final = "Answer the question using a single word or phrase."
OPTION_LETTER: Final = "Answer with the option's letter from the given choices directly."

OR: Final = "<OR>"
"""Joins right answers of which any will do."""

Parts = tuple[str | Mention, ...]
_T = TypeVar("_T")


def choose(variants: Sequence[_T], rng: np.random.Generator) -> _T:
    """Draw one of ``variants``, uniformly."""
    return variants[int(rng.integers(len(variants)))]


def fill(template: str, *values: str | Mention | Parts) -> Parts:
    """Put values at the ``{}`` of a template, in order."""
    texts = template.split("{}")
    if len(texts) != len(values) + 1:
        raise ValueError(f"`{template}` has {len(texts) - 1} places for {len(values)} values")
    parts: list[str | Mention] = [texts[0]]
    for value, text in zip(values, texts[1:], strict=True):
        parts += value if isinstance(value, tuple) else (value,)
        parts.append(text)
    return join(parts)


def join(parts: Sequence[str | Mention]) -> Parts:
    """Merge neighbouring texts and drop empty ones."""
    merged: list[str | Mention] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(part for part in merged if part != "")


def capitalised(parts: Parts) -> Parts:
    """Return a text whose first letter is a capital, unless a mention comes first."""
    first, *others = parts
    return (first[:1].upper() + first[1:], *others) if isinstance(first, str) else parts


def exchange(
    question: Parts, answer: Parts | str, *, has_image: bool = True
) -> tuple[DraftTurn, DraftTurn]:
    """Return a question and its answer as two turns."""
    answered = (answer,) if isinstance(answer, str) else answer
    return DraftTurn("user", question, has_image), DraftTurn("assistant", answered)
