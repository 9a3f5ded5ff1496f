"""Texts made comparable: what counts as the same answer without a language model.

Two strengths are offered. :func:`is_exact_match` ignores case and punctuation only, as the
short-answer benchmarks do. :func:`answer_tokens` goes further (articles, number words, accents)
and is what :class:`vipllava.evaluation.judge.OfflineMatcher` compares.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

_PartReader = Callable[[Sequence[str], int], tuple[int | None, int]]

_ARTICLES: Final = frozenset({"a", "an", "the"})

_SMALL: Final = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
}
_TENS: Final = {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
_ORDINALS: Final = {
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
    "sixth": "6th",
    "seventh": "7th",
    "eighth": "8th",
    "ninth": "9th",
    "tenth": "10th",
    "eleventh": "11th",
    "twelfth": "12th",
}

# A fraction, date or time is one token, so that "3" is not found in "3/4". A minus is a sign only
# where no word stands before it ("x=-3", not "11-22"). A comma between groups of three digits
# separates thousands.
_TOKEN: Final = re.compile(
    r"(?P<compound>\d+(?:[/:]\d+)+)"
    r"|(?P<ordinal>\d+(?:st|nd|rd|th)\b)"
    r"|(?P<number>(?<!\w)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"|(?P<decimal>(?<!\w)-?\.\d+)"
    r"|(?P<percent>%)"
    r"|(?P<word>[^\W\d_]+)"
)
_REPLACED: Final = str.maketrans({"\u2212": "-", "\u2019": "'"})


def answer_tokens(text: str, *, keep_articles: bool = False) -> tuple[str, ...]:
    """Split ``text`` into comparable tokens.

    Case, accents, apostrophes and punctuation go; articles go unless ``keep_articles``; number
    words become digits (``twenty-one`` and ``21``, ``first`` and ``1st``); numbers lose thousands
    separators and trailing zeros (``1,200.0`` is ``1200``); ``%`` reads ``percent``.
    """
    plain = unicodedata.normalize("NFKD", text.translate(_REPLACED)).casefold()
    plain = "".join(char for char in plain if not unicodedata.combining(char)).replace("'", "")
    tokens: list[str] = []
    for match in _TOKEN.finditer(plain.replace("\u2044", "/")):
        token = match.group()
        if match.lastgroup in ("number", "decimal"):
            token = _canonical_number(token)
        elif match.lastgroup == "percent":
            token = "percent"
        tokens.append(_ORDINALS.get(token, token))
    tokens = _join_number_words(tokens)
    return tuple(token for token in tokens if keep_articles or token not in _ARTICLES)


def contains_tokens(tokens: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether ``wanted`` stands in ``tokens`` as a contiguous run of whole tokens."""
    width = len(wanted)
    wanted = tuple(wanted)
    return width > 0 and any(
        tuple(tokens[start : start + width]) == wanted for start in range(len(tokens) - width + 1)
    )


def is_exact_match(prediction: str, truth: str) -> bool:
    """Tell whether both texts have the same words, case and punctuation aside."""
    return _words(prediction) == _words(truth)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _canonical_number(token: str) -> str:
    token = token.replace(",", "")
    sign, digits = ("-", token[1:]) if token.startswith("-") else ("", token)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    return sign + (f"{whole}.{fraction}" if fraction else whole)


def _join_number_words(tokens: Sequence[str]) -> list[str]:
    """Replace runs of number words by one number; ``one two`` stays two numbers."""
    joined: list[str] = []
    index = 0
    while index < len(tokens):
        value, end = _read_number(tokens, index)
        joined.append(tokens[index] if value is None else str(value))
        index = max(end, index + 1)
    return joined


def _read_number(tokens: Sequence[str], start: int) -> tuple[int | None, int]:
    """Read a number below a million, e.g. ``two thousand one hundred and five``."""
    return _read_multiple(tokens, start, "thousand", 1000, _read_below_thousand)


def _read_below_thousand(tokens: Sequence[str], start: int) -> tuple[int | None, int]:
    return _read_multiple(tokens, start, "hundred", 100, _read_below_hundred)


def _read_multiple(
    tokens: Sequence[str], start: int, unit: str, factor: int, read_part: _PartReader
) -> tuple[int | None, int]:
    """Read ``PART [unit [[and] PART]]``, where ``read_part`` reads a PART below ``unit``."""
    value, end = read_part(tokens, start)
    if value is None or end >= len(tokens) or tokens[end] != unit:
        return value, end
    value, end = value * factor, end + 1
    skip = 1 if end < len(tokens) and tokens[end] == "and" else 0
    rest, rest_end = read_part(tokens, end + skip)
    return (value, end) if rest is None else (value + rest, rest_end)


def _read_below_hundred(tokens: Sequence[str], start: int) -> tuple[int | None, int]:
    if start >= len(tokens):
        return None, start
    token = tokens[start]
    if token in _SMALL:
        return _SMALL[token], start + 1
    if token not in _TENS:
        return None, start
    unit = _SMALL.get(tokens[start + 1], 0) if start + 1 < len(tokens) else 0
    return (_TENS[token] + unit, start + 2) if 0 < unit < 10 else (_TENS[token], start + 1)
