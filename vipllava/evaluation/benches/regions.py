"""Held-out questions about marked regions, and the control: the same without the marks.

Every record ends with an assistant turn; the turns before it are the question, its text the right
answer. The marks come from a plan keyed by (seed, data set, key), so that the question is the same
in every run. In the control the words stay and only the drawing is left out: a model that answers
as well without marks never looked at them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from vipllava.evaluation.bench import Answered, Asked, Bench, BenchData, BenchTable, jsonl
from vipllava.evaluation.matching import is_exact_match
from vipllava.evaluation.statistics import paired_difference_interval, wilson_interval
from vipllava.types import ConfigError, RecordError, Request, Sample, Turn

if TYPE_CHECKING:
    from PIL import Image

    from vipllava.visual_prompts.policies import VisualPromptPolicy

PREDICTIONS: Final = "predictions.jsonl"
_ENDING: Final = ["user", "assistant"]


@dataclass(frozen=True)
class RegionsOptions:
    """Settings of this benchmark.

    Attributes:
        draw_marks: whether the marks are drawn; ``both`` asks every question twice.
    """

    draw_marks: bool | Literal["both"] = "both"

    def __post_init__(self) -> None:
        """Refuse what is no such setting; 1 and 0 are not true and false."""
        if type(self.draw_marks) is not bool and self.draw_marks != "both":
            raise ConfigError(f"draw_marks={self.draw_marks}: expected one of true, false, both")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with both of its images.

    Attributes:
        key: ``dataset/key`` of the record.
        turns: what is asked, up to the last user turn.
        answer: the right answer.
        shape: the mark's shape, or ``none``; the first mark's where there are several.
        marked: the image with the marks drawn.
        unmarked: the stored image.
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
    """One question and its answers; ``marked`` or ``unmarked`` is None where it was not asked."""

    key: str
    question: str
    shape: str
    answer: str
    marked: str | None = None
    unmarked: str | None = None


def read_questions(
    samples: Iterable[Sample], policies: Mapping[str, VisualPromptPolicy], seed: int
) -> Iterator[Question]:
    """Plan, word and draw every sample, one at a time.

    Raises:
        RecordError: a record without image, or whose last turn is not an answer.
    """
    from vipllava.records.image_decode import decode_image
    from vipllava.stream.sample_encoder import marks_generator, plan_sample
    from vipllava.visual_prompts.render import render_plan

    for sample in samples:
        name = f"{sample.dataset}/{sample.key}"
        if sample.image is None or [turn.role for turn in sample.turns[-2:]] != _ENDING:
            raise RecordError(
                f"{name} cannot be asked: a region question needs an image and ends with the "
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
    questions: Iterable[Question], draw_marks: bool | Literal["both"]
) -> Iterator[Asked[Prediction]]:
    """Ask every question with its marks, without, or both."""
    for q in questions:
        images = {"marked": q.marked, "unmarked": q.unmarked}
        if draw_marks != "both":
            del images["unmarked" if draw_marks else "marked"]
        requests = {way: Request(image, q.turns, q.key) for way, image in images.items()}
        yield Asked(Prediction(q.key, q.text, q.shape, q.answer), requests)


def score(answered: Sequence[Answered[Prediction]]) -> dict[str, Any]:
    """Score answers by exact match, ignoring case and punctuation.

    Returns:
        ``num_questions``; ``marked`` and ``unmarked`` (null where not asked), each with
        ``correct``, ``total``, ``accuracy`` and its 95 % Wilson interval ``low``, ``high``;
        ``gap`` of the two with its paired 95 % interval; ``by_shape`` with both.
    """
    predictions = _predictions(answered)
    by_shape: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_shape[prediction.shape].append(prediction)
    return {
        "num_questions": len(predictions),
        **_accuracies(predictions),
        "gap": _gap(predictions),
        "by_shape": {shape: _accuracies(by_shape[shape]) for shape in sorted(by_shape)},
    }


def _read(data: BenchData) -> Iterator[Asked[Prediction]]:
    questions = read_questions(data.samples(), data.policies, data.seed)
    return ask(questions, data.options.draw_marks)


def _predictions(answered: Sequence[Answered[Prediction]]) -> list[Prediction]:
    return [replace(each.item, **each.texts) for each in answered]


def _files(answered: Sequence[Answered[Prediction]]) -> dict[str, str]:
    return {PREDICTIONS: jsonl(map(asdict, _predictions(answered)))}


def _table(results: Mapping[str, Any]) -> BenchTable:
    def row(name: str, of: Mapping[str, Any]) -> tuple[str, ...]:
        known = of["marked"] or of["unmarked"]
        return name, str(known["total"]), _percent(of["marked"]), _percent(of["unmarked"])

    return BenchTable(
        f"regions: {results['num_questions']} questions, accuracy in % (95 %)",
        ("shape", "questions", "with marks", "marks not drawn"),
        [row(shape, of) for shape, of in results["by_shape"].items()],
        row("all", results),
    )


def _percent(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return "-"
    share, low, high = (100 * accuracy[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f} ({low:.1f}-{high:.1f})"


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


REGIONS: Final = Bench("regions", _read, score, _table, _files, RegionsOptions)
