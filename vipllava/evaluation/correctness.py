"""ViP-Bench's way of judging: how correct a free answer is, from 0.0 to 1.0, by a language model.

The message is a table with worked rows, and the item as its last row, whose last cell the judge is
to fill in: ``question | ground truth | prediction | ``. A verdict is the first word of the reply, a
number from 0 to 1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vipllava.evaluation.bench import Prediction
from vipllava.evaluation.judge import Judge, Judged, JudgeQuestion
from vipllava.evaluation.matching import AND, OR
from vipllava.inference.endpoint import Reply
from vipllava.types import Failure, VipLlavaError

REMINDER: Final = "\nWrite the number for the last cell and nothing else: "
_DECIMALS: Final = 1
_NUMBER: Final = re.compile(r"[01]|[01]?\.[0-9]+")
_GOES_ON: Final = re.compile(r"/|%|out(?:\s+of\b|$)|of\s+[0-9]|[.,]\s*(?:[0-9]|$)", re.I)
"""Behind a number that is a part of another one: ``1 / 10``, ``1 out of 10``, ``0 . 8``."""

_OURS: Final = """\
You grade answers about images without seeing them. Each row of the table below has a question, \
the ground truth, a model's prediction and how correct the prediction is: a number from 0.0 \
(wrong) to 1.0 (right) in steps of 0.1. Where <AND> joins parts of the ground truth, a prediction \
is right only if it has all of them, and it earns a share for some. Where <OR> joins them, one of \
them is enough. Judge the meaning: other words for the same thing are right, and what the question \
did not ask for does not matter unless it contradicts the ground truth. Fill in the last cell of \
the last row with the number alone.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which fruit is inside the green ellipse? | a pear | The marked fruit looks like a pear. | 1.0
Which fruit is inside the green ellipse? | a pear | It is an apple. | 0.0
Which tools do the two arrows point at? | hammer <AND> saw | A hammer and a wrench. | 0.5
How much is the ticket in the red box? | 12.50 <OR> twelve and a half dollars | $12.50 | 1.0
Who is the person at the blue point, and what does she hold? | the goalkeeper <AND> a towel <AND> \
a bottle | She is the goalkeeper and holds a bottle. | 0.7
What is the number in the box times three? | 21 <OR> 7 x 3 = 21 | The number in the box is 7. | 0.2
Why is the marked man running? | his bus is leaving | He seems to hurry after a vehicle. | 0.6
"""


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """What stands above the item's row."""

    text: str = _OURS
    source: str = "ours"  # or the path of a file

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_prompt(path: Path) -> JudgePrompt:
    """Read another prompt, e.g. the official one, up to its last worked row.

    Raises:
        VipLlavaError: it cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VipLlavaError(f"the judge's prompt {path} cannot be read: {error}") from error
    if not text.strip():
        raise VipLlavaError(f"the judge's prompt {path} is empty")
    return JudgePrompt(text, str(path))


def correctness_question(
    prompt: JudgePrompt, key: str, question: str, ground_truth: str, prediction: str
) -> JudgeQuestion[float]:
    """Return what a judge is asked about an answer; the question is worded as the model had it."""
    for word in (AND, OR):
        ground_truth = ground_truth.replace(word, f" {word} ")
    row = " | ".join((question, ground_truth, prediction, ""))
    text = prompt.text.rstrip("\n") + "\n\n" + row
    return JudgeQuestion(key, text, read_correctness, REMINDER)


def read_correctness(reply: Reply) -> float | None:
    """Return the number at the start of a reply, or None if there is none from 0 to 1.

    A reply that the limit of tokens has cut may be the start of another number: ``0`` and ``0.``
    of 0.5 are none. Neither are numbers that are a part of another one: ``1`` of ``1 out of 10``.
    """
    words = reply.text.split()
    if not words or not _NUMBER.fullmatch(words[0]) or float(words[0]) > 1:
        return None
    if _GOES_ON.match(" ".join(words[1:])):
        return None
    if reply.finish_reason == "length" and len(words) == 1 and "." not in words[0]:
        return None
    return float(words[0])


@dataclass(frozen=True)
class Grader:
    """A judge and what stands above the item's row."""

    judge: Judge
    prompt: JudgePrompt = field(default_factory=JudgePrompt)

    def grade(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Return answers with their verdicts and the mean of these; an empty one is judged, too.

        One that has no verdict in some run is a failure with its reason.

        Raises:
            EndpointError: see :meth:`vipllava.evaluation.judge.Judge.judge`.
        """
        questions = (
            correctness_question(
                self.prompt, each.key, each.question, str(each.ground_truth), each.answer or ""
            )
            for each in predictions
        )
        judged = {each.key: each for each in self.judge.judge(questions)}
        return [_graded(each, judged[each.key]) for each in predictions]

    def described(self, predictions: Iterable[Prediction]) -> dict[str, Any]:
        """Return what belongs beside every score; see :meth:`.judge.Judge.described`."""
        return self.judge.described(map(judged_of, predictions)) | {
            "prompt_source": self.prompt.source,
            "prompt_sha256": self.prompt.sha256,
        }


def _graded(prediction: Prediction, judged: Judged[float]) -> Prediction:
    if judged.failure is not None:
        return prediction.failed(judged.failure.reason)
    return replace(
        prediction,
        score=statistics.fmean(judged.verdicts),
        verdicts=judged.verdicts,
        replies=judged.replies,
    )


def judged_of(prediction: Prediction) -> Judged[float]:
    """Return a prediction's verdicts; what has none is a failure."""
    failure = None if prediction.verdicts else Failure(prediction.failure or "it was not judged")
    return Judged(prediction.key, prediction.verdicts, prediction.replies, failure)


def run_totals(judged: Iterable[Judged[float]]) -> dict[str, Any]:
    """Return the totals, 0 to 100, of the items that have a verdict in every run.

    Returns:
        ``total`` (mean of the runs') and ``std`` (their population deviation), None without items;
        ``totals`` per run; ``num_items`` that they are over; ``num_failures`` and ``failures``
        (key: reason).
    """
    graded: list[tuple[float, ...]] = []
    failures: dict[str, str] = {}
    for each in judged:
        if each.failure is None:
            graded.append(each.verdicts)
        else:
            failures[each.key] = each.failure.reason
    totals = [100 * statistics.fmean(verdicts) for verdicts in zip(*graded, strict=True)]
    return {
        "total": statistics.fmean(totals) if totals else None,
        "std": statistics.pstdev(totals) if totals else None,
        "totals": totals,
        "num_items": len(graded),
        "num_failures": len(failures),
        "failures": failures,
    }


def official_grades(judged: Iterable[Judged[float]]) -> dict[str, Mapping[str, Any]]:
    """Return the content of ViP-Bench's grade file; items with a failure are not in it."""
    return {
        each.key: {
            "model": [reply.model for reply in each.replies],
            "content": [reply.text for reply in each.replies],
            "score": list(each.verdicts),
        }
        for each in judged
        if each.failure is None
    }


def official_table(result: Mapping[str, Any], groups: str, model: str) -> str:
    """Return ViP-Bench's line of a model under its head, CSV: scores rounded as they are published.

    Args:
        result: ``total``, ``std``, ``totals``, and per group ``score`` and ``num_items``.
        groups: where these are: ``by_capability``, or ``by_combination``, whose names are joined
            as the evaluator does; the groups of most items come first.
        model: what it is called.
    """
    items: Mapping[str, Mapping[str, float]] = result[groups]
    ordered = sorted(items.items(), key=lambda group: -group[1]["num_items"])
    scores = [*(found["score"] for _, found in ordered), result["total"], result["std"]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name.replace(", ", "_") for name, _ in ordered]
    writer.writerow(["", *names, "total", "std", "runs"])
    runs = [round(total, _DECIMALS) for total in result["totals"]]
    writer.writerow([model, *(round(score, _DECIMALS) for score in scores), runs])
    return text.getvalue()
