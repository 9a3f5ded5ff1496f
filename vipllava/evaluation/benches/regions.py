"""Held-out questions about marked regions, and the control: the same without the marks.

Every record ends with an assistant turn; the turns before it are the question, its text the right
answer. The marks come from a plan keyed by (seed, data set, key), so that the question is the same
in every run. In the control the words stay and only the drawing is left out: a model that answers
as well without marks never looked at them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from vipllava.evaluation.answering import Answerer, answer_all
from vipllava.evaluation.matching import is_exact_match
from vipllava.evaluation.statistics import paired_difference_interval, wilson_interval
from vipllava.files.atomic import write_whole
from vipllava.inference.engine import Request
from vipllava.records.image_decode import decode_image
from vipllava.stream.sample_encoder import marks_generator, plan_sample
from vipllava.types import RecordError, Sample, Turn
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan

PREDICTIONS: Final = "predictions.jsonl"
RESULTS: Final = "results.json"
DrawMarks = Literal["true", "false", "both"]
_ENDING: Final = ["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with both of its pictures.

    Attributes:
        key: ``dataset/key`` of the record.
        turns: what is asked, up to the last user turn.
        answer: the right answer.
        shape: the mark's shape, or ``none``; the first mark's where there are several.
        marked: the picture with the marks drawn.
        unmarked: the stored picture.
    """

    key: str
    turns: tuple[Turn, ...]
    answer: str
    shape: str
    marked: Image.Image
    unmarked: Image.Image

    @property
    def text(self) -> str:
        """The last user turn's text."""
        return self.turns[-1].text


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered question; ``marked`` or ``unmarked`` is None where it was not asked."""

    key: str
    question: str
    shape: str
    answer: str
    marked: str | None
    unmarked: str | None


def read_questions(
    samples: Iterable[Sample], policies: Mapping[str, VisualPromptPolicy], seed: int
) -> Iterator[Question]:
    """Plan, word and draw every sample, one at a time.

    Raises:
        RecordError: a record without picture, or whose last turn is not an answer.
    """
    for sample in samples:
        name = f"{sample.dataset}/{sample.key}"
        if sample.image is None or [turn.role for turn in sample.turns[-2:]] != _ENDING:
            raise RecordError(
                f"{name} cannot be asked: a region question needs a picture and ends with the "
                "user's question and the assistant's answer"
            )
        image = decode_image(sample.image, name)
        rng = marks_generator(seed, 0, sample.dataset, sample.key)
        plan, turns = plan_sample(sample, image.size, policies, rng)
        yield Question(
            key=name,
            turns=turns[:-1],
            answer=turns[-1].text,
            shape=plan.prompts[0].shape if plan.prompts else "none",
            marked=render_plan(image, plan),
            unmarked=image,
        )


def ask(
    questions: Iterable[Question],
    answerer: Answerer,
    *,
    draw_marks: DrawMarks = "both",
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> list[Prediction]:
    """Ask every question with its marks, without, or both; pictures are held batch by batch."""
    ways = [name for name in ("true", "false") if draw_marks in ("both", name)]
    asked: list[Prediction] = []

    def requests() -> Iterator[Request]:
        for q in questions:
            asked.append(Prediction(q.key, q.text, q.shape, q.answer, marked=None, unmarked=None))
            for way in ways:
                yield Request(q.marked if way == "true" else q.unmarked, q.turns, q.key)

    answered = answer_all(
        answerer, requests(), max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    texts = [text for _, text in answered]
    answers = {way: texts[place :: len(ways)] for place, way in enumerate(ways)}
    nothing = [None] * len(asked)
    return [
        replace(prediction, marked=marked, unmarked=unmarked)
        for prediction, marked, unmarked in zip(
            asked, answers.get("true", nothing), answers.get("false", nothing), strict=True
        )
    ]


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Score predictions by exact match, ignoring case and punctuation.

    Returns:
        ``num_questions``; ``marked`` and ``unmarked`` (null where not asked), each with
        ``correct``, ``total``, ``accuracy`` and its 95 % Wilson interval ``low``, ``high``;
        ``gap`` of the two with its paired 95 % interval; ``by_shape`` with both.

    Raises:
        RecordError: there is nothing to score.
    """
    if not predictions:
        raise RecordError("no questions: the benchmark's data set is empty, or limit is 0")
    by_shape: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_shape[prediction.shape].append(prediction)
    return {
        "num_questions": len(predictions),
        **_accuracies(predictions),
        "gap": _gap(predictions),
        "by_shape": {shape: _accuracies(by_shape[shape]) for shape in sorted(by_shape)},
    }


def write_results(
    folder: Path, predictions: Sequence[Prediction], results: Mapping[str, Any]
) -> None:
    """Write ``predictions.jsonl`` and ``results.json`` into ``folder``."""
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions]
    write_whole(folder / PREDICTIONS, "\n".join(lines) + "\n")
    write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")


def _accuracies(predictions: Sequence[Prediction]) -> dict[str, dict[str, float] | None]:
    return {
        "marked": _accuracy([(p.marked, p.answer) for p in predictions]),
        "unmarked": _accuracy([(p.unmarked, p.answer) for p in predictions]),
    }


def _accuracy(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float] | None:
    if any(prediction is None for prediction, _ in pairs):
        return None
    correct = sum(is_exact_match(prediction or "", answer) for prediction, answer in pairs)
    low, high = wilson_interval(correct, len(pairs))
    accuracy = correct / len(pairs)
    return {
        "correct": correct, "total": len(pairs), "accuracy": accuracy, "low": low, "high": high,
    }  # fmt: skip


def _gap(predictions: Sequence[Prediction]) -> dict[str, float] | None:
    if len(predictions) < 2 or any(p.marked is None or p.unmarked is None for p in predictions):
        return None
    marked = [float(is_exact_match(p.marked or "", p.answer)) for p in predictions]
    unmarked = [float(is_exact_match(p.unmarked or "", p.answer)) for p in predictions]
    low, high = paired_difference_interval(marked, unmarked)
    gap = (sum(marked) - sum(unmarked)) / len(predictions)
    return {"accuracy": gap, "low": low, "high": high}
