"""Judges: how correct a free-form answer is, from 0.0 to 1.0 in tenths."""

from __future__ import annotations

from typing import Protocol

from vipllava.evaluation.matching import answer_tokens, contains_tokens
from vipllava.types import VipLlavaError

AND = "<AND>"
OR = "<OR>"


class NoVerdictError(VipLlavaError):
    """A judge could not grade an answer; the benchmark records a failure, never a zero."""


class Judge(Protocol):
    """Grades one answer. A language-model judge and the offline matcher look alike from here."""

    def __call__(self, question: str, ground_truth: str, prediction: str) -> float:
        """Return the correctness of ``prediction``: 0.0 to 1.0 in steps of 0.1.

        Args:
            question: the wording that the model was asked, marks named as in that split.
            ground_truth: parts joined by ``<AND>``, each of alternatives joined by ``<OR>``.
            prediction: the model's answer.

        Raises:
            NoVerdictError: the judge gave no readable verdict; the message says why.
        """
        ...


def split_ground_truth(ground_truth: str) -> tuple[tuple[str, ...], ...]:
    """Split a ground truth into parts of alternatives.

    ``<OR>`` binds tighter than ``<AND>``: ``cat<OR>kitten<AND>sofa`` is (cat or kitten) and sofa.

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


class OfflineMatcher:
    """Grades by whole words, without network or model.

    A part is right if one of its alternatives stands in the prediction as a run of whole tokens
    (see :func:`vipllava.evaluation.matching.answer_tokens`). All parts right score 1.0; otherwise
    the share of right parts, rounded half up to a tenth and at most 0.9.

    Two rules guard short answers: a `yes` or `no` is compared with the first yes or no of the
    prediction, and an alternative of articles alone (the option letter `A`) must be the whole
    prediction.

    Limits, all of which a language model would see through: synonyms and other word forms do not
    match (`dogs` for `dog`, `TV` for `television`), a denied or hedged answer does (`not red`,
    `red or blue`), `one` as a pronoun reads as the number, and word order matters. Use it to
    compare runs with each other, not with published figures.
    """

    def __call__(self, question: str, ground_truth: str, prediction: str) -> float:
        """Return the correctness in tenths; the question is not looked at."""
        del question
        parts = split_ground_truth(ground_truth)
        matched = sum(any(_is_in(text, prediction) for text in part) for part in parts)
        if matched == len(parts):
            return 1.0
        tenths = (20 * matched + len(parts)) // (2 * len(parts))
        return min(tenths, 9) / 10


def _is_in(alternative: str, prediction: str) -> bool:
    wanted = answer_tokens(alternative)
    if not wanted:
        with_articles = answer_tokens(alternative, keep_articles=True)
        if not with_articles:
            # Nothing but symbols, e.g. a drawn face: compare the characters themselves.
            return alternative.strip() in prediction
        return answer_tokens(prediction, keep_articles=True) == with_articles
    given = answer_tokens(prediction)
    if wanted in (("yes",), ("no",)):
        said = [token for token in given if token in ("yes", "no")]
        return said[:1] == list(wanted)
    return contains_tokens(given, wanted)
