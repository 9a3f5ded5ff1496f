"""Judges: how correct a free-form answer is, from 0.0 to 1.0 in tenths."""

from __future__ import annotations

from collections.abc import Callable

from vipllava.evaluation.matching import answer_tokens
from vipllava.types import VipLlavaError

AND = "<AND>"
OR = "<OR>"

Judge = Callable[[str, str, str], float]
"""Returns the correctness of (question, ground truth, prediction): 0.0 to 1.0 in steps of 0.1.

The question is worded as the model was asked. A judge that gives no readable verdict raises
:class:`NoVerdictError`.
"""


class NoVerdictError(VipLlavaError):
    """A judge could not grade an answer; the benchmark records a failure, never a zero."""


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
    (see :func:`vipllava.evaluation.matching.answer_tokens`). All parts right score 1.0; otherwise
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
