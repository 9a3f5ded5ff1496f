"""Scores of single answers, by the names that ``bench.score`` knows them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from vipllava.evaluation.bench import BenchData, Prediction, Scorer
from vipllava.evaluation.captions.ptb_tokenizer import tokenize
from vipllava.evaluation.captions.scores import check_metrics, corpus_meteor, score_captions
from vipllava.evaluation.matching import (
    OR,
    NoVerdictError,
    is_exact_match,
    is_lenient_match,
    match_offline,
)
from vipllava.evaluation.statistics import Statistic
from vipllava.types import ConfigError, VipLlavaError

_LETTER: Final = re.compile(r"^\W*(?:(?:the )?(?:answer|option)\W+(?:is\W+)?)?([a-z])\b", re.I)


def per_item(**figures: Callable[[Prediction], float]) -> Scorer:
    """Return a scorer that looks at each answer alone.

    Args:
        figures: ``score``, and others that are to stand beside it. One that raises
            :class:`NoVerdictError` leaves the item without a score.
    """

    def score(predictions: Sequence[Prediction], data: BenchData) -> list[Prediction]:
        return [_scored(each, figures) for each in predictions]

    return score


def _scored(each: Prediction, figures: dict[str, Callable[[Prediction], float]]) -> Prediction:
    try:
        found = {name: float(figure(each)) for name, figure in figures.items()}
    except NoVerdictError as error:
        return each.failed(f"no verdict: {error}")
    return replace(each, score=found.pop("score"), more=found, failure=None)


def exact(prediction: Prediction) -> float:
    """Return 1 if the whole answer is a right one, case aside: ``A.`` is not ``A``."""
    return _any_of(prediction, is_exact_match)


def lenient(prediction: Prediction) -> float:
    """Return 1 if the words are those of the right answer, punctuation aside."""
    return _any_of(prediction, is_lenient_match)


def _any_of(prediction: Prediction, match: Callable[[str, str], bool]) -> float:
    """Return 1 if one of the right answers, which ``<OR>`` separates, matches."""
    answer, truths = prediction.answer or "", str(prediction.ground_truth).split(OR)
    return float(any(match(answer, truth) for truth in truths))


def letter(prediction: Prediction) -> float:
    """Return 1 if the answer begins with the right letter: ``B. the red one``, ``Answer: B``."""
    found = _LETTER.match(prediction.answer or "")
    return float(found is not None and found[1].upper() == str(prediction.ground_truth).upper())


def offline(prediction: Prediction) -> float:
    """Return the share of the ground truth's parts that are found; see :func:`match_offline`."""
    return match_offline(prediction.question, str(prediction.ground_truth), prediction.answer or "")


def judged(predictions: Sequence[Prediction], data: BenchData) -> list[Prediction]:
    """Return the verdicts of the job's judge."""
    if data.judge is None:
        raise ConfigError("a judge is to grade, and none is given: name its address and model")
    return data.judge.grade(predictions)


def captions(*more: str) -> Scorer:
    """Return a scorer whose score is CIDEr-D; document frequencies are those of the answered items.

    Args:
        more: other metrics of :func:`score_captions`, to stand beside it.
    """

    def score(predictions: Sequence[Prediction], data: BenchData) -> list[Prediction]:
        given = {each.key: str(each.ground_truth).split(OR) for each in predictions}
        references = {key: texts for key, texts in given.items() if any(map(tokenize, texts))}
        answers = {each.key: each.answer or "" for each in predictions if each.key in references}
        if len(answers) < 2:  # e.g. of the one item whose mark can move
            why = "CIDEr weighs words by how many of the items have them: there have to be two"
            return [each.failed(why) for each in predictions]
        found = score_captions(answers, references, ("cider", *more))
        return [
            replace(
                each,
                score=found.items["cider"][each.key],
                more={name: found.items[name][each.key] for name in more},
                sums={name: of[each.key] for name, of in found.counts.items()},
                failure=None,
            )
            if each.key in references
            else each.failed("no reference has words")
            for each in predictions
        ]

    return score


SCORERS: Final[dict[str, Scorer]] = {
    "exact": per_item(score=exact, lenient=lenient),
    "letter": per_item(score=exact, lenient_letter=letter),
    "offline": per_item(score=offline),
    "judge": judged,
    "captions": captions("meteor"),
    "cider": captions(),
}
"""By the names of ``bench.score``. Measures of all answers together belong here, too."""
STATISTICS: Final[Mapping[str, Statistic]] = {"meteor": corpus_meteor}
"""Figures whose total is a function of a prediction's ``sums``, summed over the items."""


def check_score(name: str) -> None:
    """Raise what scoring would for want of a program, before anything is asked.

    Raises:
        VipLlavaError: a program is not installed; says how to get it, and what does without.
    """
    if name == "captions":
        try:
            check_metrics(["cider", "meteor"])
        except VipLlavaError as error:
            raise VipLlavaError(f"score={name}: {error}, by score=cider") from None
