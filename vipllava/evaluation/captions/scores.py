"""CIDEr and METEOR of a set of captions: what a benchmark of captions calls.

texts --tokenize--> tokens --cider, meteor--> a value per item and per set
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from vipllava.evaluation.captions.cider import cider
from vipllava.evaluation.captions.meteor import ALPHA, BETA, GAMMA, find_meteor, meteor
from vipllava.evaluation.captions.ptb_tokenizer import tokenize
from vipllava.types import VipLlavaError

Scorer = Callable[
    [Sequence[str], Sequence[Sequence[str]]],
    tuple[list[float], float, list[tuple[float, ...]] | None],
]


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Values as pycocoevalcap gives them; papers write them times 100."""

    items: Mapping[str, Mapping[str, float]]  # by metric, then by item
    totals: Mapping[str, float]  # by metric. METEOR's is computed from summed counts, no mean.
    # By metric whose total is no mean, then by item: the total is a function of their sums.
    counts: Mapping[str, Mapping[str, tuple[float, ...]]] = field(
        default_factory=dict[str, Mapping[str, tuple[float, ...]]]
    )


def score_captions(
    answers: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = ("cider", "meteor"),
) -> CaptionScores:
    """Score each answer against the references of its item.

    CIDEr counts document frequencies over these very items. An empty answer scores 0. An item
    that has no answer, because its request failed, has no place in either mapping.

    Raises:
        VipLlavaError: the items of both mappings differ, an item has no reference with words in
            it, there are too few items, a metric is unknown or not installed.
    """
    check_metrics(metrics)
    _check_items(answers, references, 2 if "cider" in metrics else 1)
    keys = list(answers)
    hypotheses = [tokenize(answers[key]) for key in keys]
    truths = [[tokenize(text) for text in references[key]] for key in keys]
    if wordless := [key for key, texts in zip(keys, truths, strict=True) if not any(texts)]:
        raise VipLlavaError(f"no reference with words: {_some(wordless)}")
    items: dict[str, dict[str, float]] = {}
    totals: dict[str, float] = {}
    summed: dict[str, dict[str, tuple[float, ...]]] = {}
    for metric in metrics:
        values, totals[metric], counts = _SCORERS[metric](hypotheses, truths)
        items[metric] = dict(zip(keys, values, strict=True))
        if counts is not None:
            summed[metric] = dict(zip(keys, counts, strict=True))
    return CaptionScores(items, totals, summed)


def check_metrics(metrics: Iterable[str]) -> None:
    """Raise what :func:`score_captions` would, before anything is asked.

    Raises:
        VipLlavaError: a metric is unknown or not installed.
    """
    if unknown := sorted(set(metrics) - set(_SCORERS)):
        raise VipLlavaError(
            f"unknown metrics of captions: {', '.join(unknown)}; there are {', '.join(_SCORERS)}"
        )
    if "meteor" in metrics:
        find_meteor()


def corpus_meteor(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return METEOR of a set from its items' counts, summed: [..., 6] to [...].

    The program tells its total once; a bootstrap asks for it ten thousand times.
    """
    length, ref_length, matches, ref_matches, chunks, words = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = 1 / ((1 - ALPHA) * length / matches + ALPHA * ref_length / ref_matches)
        score = mean * (1 - GAMMA * (chunks / words) ** BETA)
    return np.where((matches > 0) & (ref_matches > 0), score, 0.0)


def _check_items(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]], fewest: int
) -> None:
    problems: list[str] = []
    if unanswered := [key for key in references if key not in answers]:
        problems.append(f"no answer to {_some(unanswered)}")
    if unknown := [key for key in answers if key not in references]:
        problems.append(f"answers to items without references: {_some(unknown)}")
    if bare := [key for key, texts in references.items() if isinstance(texts, str)]:
        problems.append(f"references have to be a list of texts, not one text: {_some(bare)}")
    if not problems and len(answers) < fewest:
        problems.append(
            f"{len(answers)} captions to score, and there have to be {fewest} or more: CIDEr "
            "weighs words by how many of the items have them"
        )
    if problems:
        raise VipLlavaError("; ".join(problems))


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(f"`{key}`" for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _cider(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[float], float, None]:
    values = cider(answers, references)
    return values.tolist(), float(values.mean()), None


def _meteor(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[float], float, list[tuple[float, ...]]]:
    scores = meteor(answers, references)
    return scores.items, scores.total, scores.counts


_SCORERS: Final[Mapping[str, Scorer]] = {"cider": _cider, "meteor": _meteor}
