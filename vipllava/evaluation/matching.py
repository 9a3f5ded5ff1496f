"""Texts made comparable: what counts as the same answer without a language model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

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
_ORDINALS: Final[dict[str, str]] = dict(
    zip(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(),
        "1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th".split(),
        strict=True,
    )
)
_UNITS: Final = (("thousand", 1000), ("hundred", 100))

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
    """Split ``text`` into the tokens that a judge compares.

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
        tokens.append(_ORDINALS.get(str(token), str(token)))
    tokens = _join_number_words(tokens)
    return tuple(token for token in tokens if keep_articles or token not in _ARTICLES)


def is_exact_match(prediction: str, truth: str) -> bool:
    """Tell whether both texts have the same words, as short-answer benchmarks compare them.

    Only case and punctuation are put aside.
    """
    first, second = (
        re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
        for text in (prediction, truth)
    )
    return first == second


def _canonical_number(token: str) -> str:
    sign = "-" if token.startswith("-") else ""
    whole, _, fraction = token.removeprefix("-").replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return sign + (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def _join_number_words(tokens: list[str]) -> list[str]:
    """Replace runs of number words by one number; ``one two`` stays two numbers."""
    joined: list[str] = []
    index = 0
    while index < len(tokens):
        value, end = _read_number(tokens, index)
        joined.append(tokens[index] if value is None else str(value))
        index = max(end, index + 1)
    return joined


def _read_number(
    tokens: list[str], start: int, units: Sequence[tuple[str, int]] = _UNITS
) -> tuple[int | None, int]:
    """Read a number below a million, e.g. ``two thousand one hundred and five``.

    It is ``PART [unit [[and] PART]]`` of the first unit, and each PART is one of the other units.
    """
    if not units:
        return _read_below_hundred(tokens, start)
    (unit, factor), *smaller = units
    value, end = _read_number(tokens, start, smaller)
    if value is None or tokens[end : end + 1] != [unit]:
        return value, end
    value, end = value * factor, end + 1
    after_and = end + (tokens[end : end + 1] == ["and"])
    rest, rest_end = _read_number(tokens, after_and, smaller)
    return (value, end) if rest is None else (value + rest, rest_end)


def _read_below_hundred(tokens: list[str], start: int) -> tuple[int | None, int]:
    word, following = (*tokens[start : start + 2], "", "")[:2]
    if word in _SMALL:
        return _SMALL[word], start + 1
    if word not in _TENS:
        return None, start
    unit = _SMALL.get(following, 0)
    return (_TENS[word] + unit, start + 2) if 0 < unit < 10 else (_TENS[word], start + 1)
