"""The page at the end of the quick start: does the model answer about the marked region?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image

from vipllava.files.atomic import write_whole
from vipllava.report.charts import Bar, bar_chart, loss_chart
from vipllava.report.html import (
    Child,
    Html,
    element,
    embed_image,
    join,
    load_style,
    page,
    section,
    soft,
    table,
    terms,
)
from vipllava.report.loss_curves import smooth

_STAGES: Final[Mapping[str, str]] = {
    "pretrain": "projector only, on captions",
    "finetune": "projector and language model, on region questions",
    "gpt4v": "projector and language model, on region dialogues and a replay",
}
_CAPABILITIES: Final[Mapping[str, str]] = {
    "rec": "recognition",
    "ocr": "reading (OCR)",
    "know": "knowledge",
    "math": "mathematics",
    "rel": "relations",
    "lang": "language",
}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers with its 95 % interval; bounds are shares 0..1."""

    name: str
    correct: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.correct / self.total


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out question with the model's answers.

    Attributes:
        image: with the mark drawn.
        question: the user's text.
        answer: the right answer.
        marked: the model's answer, or None if it was not asked.
        unmarked: the same for the image without the mark.
        shape: the mark's shape.
    """

    image: Image.Image
    question: str
    answer: str
    marked: str | None
    unmarked: str | None
    shape: str

    def is_right(self, prediction: str) -> bool:
        """Compare as the benchmark does: words only, case and punctuation aside."""
        said, truth = (re.findall(r"\w+", text.casefold()) for text in (prediction, self.answer))
        return said == truth


@dataclass(frozen=True, slots=True)
class QuickstartPage:
    """Everything the page shows.

    Attributes:
        shapes_image: the eight shapes, see :mod:`vipllava.report.shapes_image`.
        loss_curves: per stage (optimizer step, loss).
        marked: accuracy with the marks drawn.
        unmarked: the control, marks not drawn.
        gap: difference of the two with its paired 95 % interval: value, low, high; shares.
        by_shape: shape, accuracy with and without marks.
        vip_bench: per split the scores 0..100 by capability, and ``total``.
        vip_bench_items: graded items of a split.
        examples: held-out questions to look at, chosen without looking at the answers.
        seconds: duration of the parts, and of ``all``.
        versions: package to version.
        vip_bench_intervals: per split the 95 % interval of the total.
        notes: further lines of the footer, title to text.
    """

    shapes_image: Image.Image
    loss_curves: Mapping[str, Sequence[tuple[int, float]]]
    marked: Accuracy
    unmarked: Accuracy
    gap: tuple[float, float, float]
    by_shape: Sequence[tuple[str, Accuracy, Accuracy]]
    vip_bench: Mapping[str, Mapping[str, float]]
    vip_bench_items: int
    examples: Sequence[Example]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    vip_bench_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def write_quickstart_page(path: Path, content: QuickstartPage) -> None:
    """Write the page as one file that needs no other and no network."""
    write_whole(path, build_quickstart_page(content))


def build_quickstart_page(content: QuickstartPage) -> str:
    """Return the page's HTML."""
    return page(
        "ViP-LLaVA quick start",
        load_style("style.css"),
        element("h1", "Does the model answer about the marked region?"),
        soft(
            "A tiny ViP-LLaVA, trained in three stages on the sample world, answers short "
            "questions about a mark drawn on a picture it has never seen. The control asks the "
            "same questions, in the same words, with the mark left out of the picture: what then "
            "remains is at best guessing among the objects of the scene."
        ),
        _headline(content),
        _shapes(content.shapes_image),
        _losses(content.loss_curves),
        element("div", _by_shape(content), _vip_bench(content), class_="two"),
        section(
            "Held-out questions",
            "Chosen by the shape of their mark, not by the answer. Green: right; red: wrong.",
            element("div", [_card(example) for example in content.examples], class_="cards"),
        ),
        _footer(content),
    )


def _headline(content: QuickstartPage) -> Html:
    marked, (gap, low, high) = content.marked, content.gap
    bars = [
        _bar("mark drawn", marked, "marked"),
        _bar("mark not drawn", content.unmarked, "unmarked"),
    ]
    return element(
        "section",
        element(
            "div",
            element("div", _percent(marked.share), class_="number"),
            element("p", f"of {marked.total} held-out questions answered right with the mark"),
            soft(
                f"{100 * gap:+.1f} points over the control (95 %: {100 * low:+.1f} to "
                f"{100 * high:+.1f}, paired)"
            ),
        ),
        element("div", bar_chart(bars)),
        class_="hero",
    )


def _bar(name: str, accuracy: Accuracy, kind: str) -> Bar:
    label = (
        f"{name}: {_percent(accuracy.share)} ({100 * accuracy.low:.1f} to "
        f"{100 * accuracy.high:.1f}), {accuracy.correct} of {accuracy.total}"
    )
    return Bar(label, accuracy.share, accuracy.low, accuracy.high, kind)


def _shapes(sheet: Image.Image) -> Html:
    alt = "Eight photographs, each with a region marked by another shape and its wording below"
    return section(
        "Eight ways to mark a region",
        "Drawn from the same plan that words the question: the text never names a colour or "
        "shape that the picture does not show.",
        element("div", embed_image(sheet, alt, class_="sheet"), class_="scroll"),
    )


def _losses(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Html:
    panels = [
        element(
            "figure",
            element("h3", f"{number}. {stage}", element("span", _ends(curve), class_="ends")),
            element("figcaption", _STAGES.get(stage, "")),
            loss_chart(stage, curve),
            class_="panel",
        )
        for number, (stage, curve) in enumerate(curves.items(), start=1)
    ]
    return section(
        "Loss of the three stages",
        "Per supervised token of the global batch; thin: every step, thick: moving average.",
        element("div", panels, class_="three"),
    )


def _ends(curve: Sequence[tuple[int, float]]) -> str:
    average = smooth(curve)
    return f"{average[0][1]:.2f} \u2192 {average[-1][1]:.2f}"


def _by_shape(content: QuickstartPage) -> Html:
    rows = [
        [shape, marked.total, _share_cell(marked), _share_cell(unmarked)]
        for shape, marked, unmarked in [
            *content.by_shape,
            ("all", content.marked, content.unmarked),
        ]
    ]
    return section(
        "Accuracy by shape",
        "In %, with 95 % Wilson intervals.",
        table(["shape", "questions", "mark drawn", "not drawn"], rows, num_total_rows=1),
    )


def _vip_bench(content: QuickstartPage) -> Html:
    splits, intervals = content.vip_bench, content.vip_bench_intervals
    names = dict.fromkeys(name for scores in splits.values() for name in scores)
    names.pop("total", None)
    rows: list[list[Child]] = [
        [_CAPABILITIES.get(name, name), *(_score_cell(s.get(name)) for s in splits.values())]
        for name in names
    ]
    total = [_score_cell(s.get("total"), intervals.get(split)) for split, s in splits.items()]
    return section(
        "Sample ViP-Bench",
        f"0 to 100, {content.vip_bench_items} items a split, graded offline by whole words. "
        "Made by this project: not comparable with published figures.",
        table(["capability", *splits], [*rows, ["total", *total]], num_total_rows=1),
    )


def _card(example: Example) -> Html:
    question, _, suffix = example.question.partition("\n")
    answers: dict[str, Child] = {
        "right answer": example.answer,
        "mark drawn": _verdict(example, example.marked),
        "mark not drawn": _verdict(example, example.unmarked),
    }
    return element(
        "article",
        embed_image(example.image, f"Scene with a {example.shape}", lossless=True, loading="lazy"),
        element("p", question, class_="question"),
        element("p", suffix, class_="suffix soft") if suffix else None,
        element("dl", terms(answers)),
        class_="card",
    )


def _verdict(example: Example, prediction: str | None) -> Html:
    if prediction is None:
        return soft("not asked", tag="span")
    right = example.is_right(prediction)
    # The sign says it to those who do not see red and green apart.
    return element(
        "span",
        "\u2713 " if right else "\u2717 ",
        prediction or "(nothing)",
        class_="verdict right" if right else "verdict wrong",
    )


def _footer(content: QuickstartPage) -> Html:
    seconds = ", ".join(f"{part} {_duration(value)}" for part, value in content.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in content.versions.items())
    lines = {"time": seconds, "versions": versions, **content.notes}
    lines["photographs"] = "astronaut, chelsea, coffee, rocket and motorcycle of scikit-image"
    return element("footer", element("dl", terms(lines)))


def _share_cell(accuracy: Accuracy) -> Html:
    return _score_cell(100 * accuracy.share, (100 * accuracy.low, 100 * accuracy.high))


def _score_cell(score: float | None, interval: tuple[float, float] | None = None) -> Html:
    if score is None:
        return Html("\u2013")
    bounds = f" {interval[0]:.0f}\u2013{interval[1]:.0f}" if interval else None
    return join([f"{score:.1f}", soft(bounds, tag="span") if bounds else None])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
