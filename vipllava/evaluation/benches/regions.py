"""Held-out questions about marked regions, and the control: the same without the marks.

A record's last turn is the right answer, the turns before it are the question. Its marks are keyed
by (seed, data set, key): the same in every run. In the control the words stay and only the drawing
is left out: a model that answers as well without marks never looked at them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from vipllava.evaluation.bench import Answered, Asked, Bench, BenchData, BenchTable, jsonl
from vipllava.evaluation.judge import is_exact_match, is_lenient_match
from vipllava.evaluation.statistics import paired_difference_interval, wilson_interval
from vipllava.types import ConfigError, RecordError, Request, Sample, Turn

if TYPE_CHECKING:
    from PIL import Image

    from vipllava.visual_prompts.policies import VisualPromptPolicy


@dataclass(frozen=True)
class RegionsOptions:
    """Settings of this benchmark."""

    # whether the marks are drawn; ``both`` asks every question twice
    draw_marks: bool | Literal["both"] = "both"

    def __post_init__(self) -> None:
        """Refuse what is no such setting; 1 and 0 are not true and false."""
        if type(self.draw_marks) is not bool and self.draw_marks != "both":
            raise ConfigError(f"draw_marks={self.draw_marks}: expected one of true, false, both")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with both of its images."""

    key: str  # ``dataset/key`` of the record
    turns: tuple[Turn, ...]  # what is asked, up to the last user turn
    answer: str  # the right answer
    shape: str  # of the first mark, or ``none``
    marked: Image.Image  # the image with the marks drawn
    unmarked: Image.Image  # the stored image

    @property
    def text(self) -> str:
        """The last user turn's text."""
        return self.turns[-1].text


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row of ``predictions.jsonl``; an answer is None where it was not asked."""

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
        RecordError: a record has no image, or does not end with question and answer.
    """
    from vipllava.records.image_decode import decode_image
    from vipllava.stream.sample_encoder import marks_generator, plan_sample
    from vipllava.visual_prompts.render import render_plan

    for sample in samples:
        name = f"{sample.dataset}/{sample.key}"
        roles = [turn.role for turn in sample.turns[-2:]]
        if sample.image is None or roles != ["user", "assistant"]:
            raise RecordError(
                f"{name} cannot be asked: a region question needs an image and ends with the "
                "user's question and the assistant's answer; leave such records out of the data "
                "set of this benchmark (`vipllava shards build` of a list without them)"
            )
        image = decode_image(sample.image, name, upright=sample.upright)
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
    """Score answers by exact match, as the published figures are.

    Returns:
        ``num_questions``; ``marked`` and ``unmarked`` (null where not asked), each with
        ``correct``, ``total``, ``accuracy`` and its 95 % Wilson interval ``low``, ``high``, and
        ``lenient_accuracy``, punctuation aside; ``gap`` of the two with its paired 95 % interval;
        ``by_shape`` with both.
    """
    by_shape: dict[str, list[Answered[Prediction]]] = defaultdict(list)
    for each in answered:
        by_shape[each.item.shape].append(each)
    return {
        "num_questions": len(answered),
        **_accuracies(answered),
        "gap": _gap(_hits(answered, "marked"), _hits(answered, "unmarked")),
        "by_shape": {shape: _accuracies(by_shape[shape]) for shape in sorted(by_shape)},
    }


def _read(data: BenchData) -> Iterator[Asked[Prediction]]:
    questions = read_questions(data.samples(), data.policies, data.seed)
    return ask(questions, data.options.draw_marks)


def _files(answered: Sequence[Answered[Prediction]]) -> dict[str, str]:
    return {"predictions.jsonl": jsonl({**asdict(each.item), **each.texts} for each in answered)}


def _table(results: Mapping[str, Any]) -> BenchTable:
    def row(name: str, of: Mapping[str, Any]) -> tuple[str, ...]:
        known = of["marked"] or of["unmarked"]
        lenient = f"{100 * known['lenient_accuracy']:.1f}"
        return name, str(known["total"]), _percent(of["marked"]), _percent(of["unmarked"]), lenient

    return BenchTable(
        f"regions: {results['num_questions']} questions, exact match in % (95 %)",
        ("shape", "questions", "with marks", "marks not drawn", "punctuation aside"),
        [row(shape, of) for shape, of in results["by_shape"].items()],
        row("all", results),
    )


def _percent(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return "-"
    share, low, high = (100 * accuracy[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f} ({low:.1f}-{high:.1f})"


def _hits(
    answered: Sequence[Answered[Prediction]],
    way: str,
    match: Callable[[str, str], bool] = is_exact_match,
) -> list[bool]:
    """Return which answers are right; none if it was not asked this way."""
    return [match(each.texts[way], each.item.answer) for each in answered if way in each.texts]


def _accuracies(answered: Sequence[Answered[Prediction]]) -> dict[str, dict[str, float] | None]:
    return {way: _accuracy(answered, way) for way in ("marked", "unmarked")}


def _accuracy(answered: Sequence[Answered[Prediction]], way: str) -> dict[str, float] | None:
    hits = _hits(answered, way)
    if not hits:
        return None
    correct, total = sum(hits), len(hits)
    low, high = wilson_interval(correct, total)
    return {
        "correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high,
        "lenient_accuracy": sum(_hits(answered, way, is_lenient_match)) / total,
    }  # fmt: skip


def _gap(marked: Sequence[bool], unmarked: Sequence[bool]) -> dict[str, float] | None:
    if len(marked) != len(unmarked) or len(marked) < 2:
        return None
    low, high = paired_difference_interval(marked, unmarked)
    return {"accuracy": (sum(marked) - sum(unmarked)) / len(marked), "low": low, "high": high}


REGIONS: Final = Bench("regions", _read, score, _table, _files, RegionsOptions)
