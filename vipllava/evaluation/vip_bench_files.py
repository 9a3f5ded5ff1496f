"""ViP-Bench's answers and verdicts, as others have saved them: to predictions with their scores.

answers  ``{"v1_0": text}``                          what a model said
grades   ``{"v1_0": {"model", "content", "score"}}`` a judge's replies and verdicts, one per run

Ids that a file lacks or nobody knows are errors: a total over other items is another number.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

from vipllava.evaluation.bench import Prediction
from vipllava.evaluation.benches.vip_bench import distinct, read_questions
from vipllava.types import RecordError

_MOST_LISTED: Final = 5


def read_answers(path: Path, folder: Path, split: str) -> list[Prediction]:
    """Read an answer file, of any model, to predictions as ``VIP_BENCH.score`` takes them.

    Args:
        path: the file.
        folder: ViP-Bench in its official layout.
        split: whose questions were asked.

    Raises:
        RecordError: a file cannot be read, ids are missing or unknown, or an answer is no text.
    """
    questions = {question.key: question for question in read_questions(folder, split)}
    answers = _read(path, questions)
    if odd := [key for key, text in answers.items() if not isinstance(text, str)]:
        raise RecordError(f"{path}: {_some(odd)}: expected a text for each id")
    return [
        Prediction(
            key=f"{split}/{key}",
            image=question.image.name,
            marks="kept",
            question=question.text,
            ground_truth=question.answer,
            groups=(split, *question.capability),
            answer=answers[key],
        )
        for key, question in questions.items()
    ]


def read_grades(path: Path, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return predictions of one split with the verdicts of a grade file, one per run.

    Raises:
        RecordError: it cannot be read, ids are missing or unknown, or the runs are not complete.
    """
    ids = {each.key.rpartition("/")[2]: each for each in predictions}
    verdicts: dict[str, tuple[float, ...]] = {}
    for key, grade in _read(path, ids).items():
        given: Any = cast("Any", grade).get("score") if isinstance(grade, dict) else None
        verdicts[key] = tuple(cast("list[Any]", given)) if isinstance(given, list) else ()
    runs = max(map(len, verdicts.values()))
    if odd := [key for key, found in verdicts.items() if not all(map(_is_verdict, found))]:
        raise RecordError(f"{path}: {_some(odd)}: expected as `score` numbers from 0 to 1")
    if odd := [key for key, found in verdicts.items() if not found or len(found) < runs]:
        raise RecordError(f"{path}: {_some(odd)}: without the verdicts of {runs} runs")
    return [
        replace(each, score=statistics.fmean(verdicts[key]), verdicts=verdicts[key], failure=None)
        for key, each in ids.items()
    ]


def _is_verdict(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast("float", value) <= 1


def _read(path: Path, known: Iterable[str]) -> dict[str, Any]:
    try:
        given: object = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise RecordError(f"{path} is no object of ids, such as `v1_0`")
    found, wanted = cast("dict[str, Any]", given), dict.fromkeys(known)
    problems: list[str] = []
    if missing := [key for key in wanted if key not in found]:
        problems.append(f"nothing for {_some(missing)}")
    if unknown := [key for key in found if key not in wanted]:
        problems.append(f"{_some(unknown)}: no such questions")
    if problems:
        raise RecordError(f"{path}: {'; '.join(problems)}: is it of another split or benchmark?")
    return found


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    return ", ".join(keys[:_MOST_LISTED]) + more
