"""What counts as the same text, and how correct a free answer is, by its words: no model needed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from vipllava.records.wording import OR
from vipllava.types import VipLlavaError

AND: Final = "<AND>"

_ARTICLES: Final = frozenset({"a", "an", "the"})

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_SMALL: Final = {word: value for value, word in enumerate(_BELOW_TWENTY.split())}
_TENS: Final = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90,
}  # fmt: skip
_ORDINALS: Final = {
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th",
    "sixth": "6th", "seventh": "7th", "eighth": "8th", "ninth": "9th", "tenth": "10th",
    "eleventh": "11th", "twelfth": "12th",
}  # fmt: skip
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

Grader = Callable[[str, str, str], float]
"""Returns the correctness of (question, ground truth, prediction): 0.0 to 1.0 in steps of 0.1.

The question is worded as the model was asked. A grader that gives no readable verdict raises
:class:`NoVerdictError`.
"""


class NoVerdictError(VipLlavaError):
    """A grader could not grade an answer; the benchmark records a failure, never a zero."""


def split_ground_truth(ground_truth: str) -> tuple[tuple[str, ...], ...]:
    """Split a ground truth into its parts, joined by ``<AND>``, of alternatives, by ``<OR>``.

    ``cat<OR>kitten<AND>sofa`` is (cat or kitten) and sofa.

    Raises:
        VipLlavaError: a part or alternative is empty.
    """
    parts = tuple(
        tuple(alternative.strip() for alternative in part.split(OR))
        for part in ground_truth.split(AND)
    )
    if any(not alternative for part in parts for alternative in part):
        raise VipLlavaError(
            f"ground truth `{ground_truth}` has an empty part or alternative; "
            f"write a text on both sides of every {AND} and {OR}"
        )
    return parts


def match_offline(question: str, ground_truth: str, prediction: str) -> float:
    """Grade by whole words, without network or model; the question is not looked at.

    A part is right if one of its alternatives stands in the prediction as a run of whole tokens
    (see :func:`answer_tokens`). All parts right score 1.0; otherwise
    the share of right parts, rounded half up to a tenth and at most 0.9. A `yes` or `no` is
    compared with the first yes or no of the prediction, and an alternative of articles alone (the
    option letter `A`) must be the whole prediction.

    Limits, all of which a language model would see through: synonyms and other word forms do not
    match (`dogs` for `dog`, `TV` for `television`), a denied or hedged answer does (`not red`,
    `red or blue`), `one` as a pronoun reads as the number, and word order matters. Use it to
    compare runs with each other, not with published figures.
    """
    parts = split_ground_truth(ground_truth)
    matched = sum(any(_is_in(text, prediction) for text in part) for part in parts)
    if matched == len(parts):
        return 1.0
    tenths = (20 * matched + len(parts)) // (2 * len(parts))
    return min(tenths, 9) / 10


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
    """Tell whether the whole answer is ``truth``, as the published figures of short answers count.

    Only case and blanks around the answer are put aside; ``A.`` is not ``A``.
    """
    return prediction.strip().lower() == truth.strip().lower()


def is_lenient_match(prediction: str, truth: str) -> bool:
    """Tell whether both texts have the same words, whatever their case and punctuation.

    More than published figures count; only for what names it.
    """
    first, second = (
        re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
        for text in (prediction, truth)
    )
    return first == second


def _is_in(alternative: str, prediction: str) -> bool:
    wanted, given = answer_tokens(alternative), answer_tokens(prediction)
    if not wanted:
        if articles := answer_tokens(alternative, keep_articles=True):
            return answer_tokens(prediction, keep_articles=True) == articles
        # Nothing but symbols, e.g. a drawn face: compare the characters themselves.
        return alternative.strip() in prediction
    if wanted in (("yes",), ("no",)):
        return next((token for token in given if token in ("yes", "no")), None) == wanted[0]
    return f" {' '.join(wanted)} " in f" {' '.join(given)} "


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
