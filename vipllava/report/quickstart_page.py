"""The page at the end of the quick start: does the model answer about the marked region?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from vipllava.files.atomic import write_whole
from vipllava.report.charts import Bar, bar_chart, loss_chart, smooth
from vipllava.report.html import Html, embed_image, escape, markup, page, read_templates, table

_TEMPLATES: Final = read_templates("quickstart.html")
_STAGES: Final[Mapping[str, str]] = {
    "pretrain": "projector only, on captions",
    "finetune": "projector and language model, on region questions",
    "gpt4v": "projector and language model, on region dialogues and a replay",
}
_CAPABILITIES: Final[Mapping[str, str]] = {
    "rec": "recognition", "ocr": "reading (OCR)", "know": "knowledge", "math": "mathematics",
    "rel": "relations", "lang": "language",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out question."""

    image: Image.Image  # with the mark drawn
    question: str  # the user's text
    answer: str  # the right answer
    marked: str | None  # what the model said with the mark; None if it was not asked
    unmarked: str | None  # likewise without
    shape: str  # of the mark


@dataclass(frozen=True, slots=True)
class QuickstartPage:
    """Everything the page shows."""

    shapes_image: Image.Image  # the eight shapes, see :mod:`vipllava.report.shapes_image`
    loss_curves: Mapping[str, Sequence[tuple[int, float]]]  # per stage (optimizer step, loss)
    regions: Mapping[str, Any]  # ``metrics.json`` of ``regions`` with all markings
    vip_bench: Mapping[str, Any]  # ``metrics.json`` of ``vip_bench``
    # held-out questions to look at, chosen without looking at the answers
    examples: Sequence[Example]
    seconds: Mapping[str, float]  # duration of the parts, and of ``all``
    versions: Mapping[str, str]  # package to version


def write_quickstart_page(path: Path, content: QuickstartPage) -> None:
    """Write the page as one file that needs no other and no network."""
    marks, splits = content.regions["marks"], content.vip_bench["splits"]
    faithful = content.regions["faithfulness"]
    gap = [_points(faithful["gap"][key]) for key in ("score", "low", "high")]
    bars = [
        _bar("mark drawn", marks["kept"], "marked"),
        _bar("mark not drawn", marks["removed"], "unmarked"),
    ]
    sheet = content.shapes_image
    middle = sheet.width // 2
    halves = [(0, 0, middle, sheet.height), (middle, 0, sheet.width, sheet.height)]
    alt = "Four photographs, each with a region marked by another shape and its wording below"
    body = markup(
        _TEMPLATES["page"],
        share=_percent(marks["kept"]),
        num_questions=marks["kept"]["num_items"],
        follows=_percent(faithful["follows"]),
        stays=_percent(faithful["stays"]),
        gap=gap[0],
        gap_low=gap[1],
        gap_high=gap[2],
        bars=bar_chart(bars),
        shapes=[embed_image(sheet.crop(half), alt) for half in halves],
        losses=[
            _loss(number, stage, curve)
            for number, (stage, curve) in enumerate(content.loss_curves.items(), start=1)
        ],
        by_shape=table(
            ["shape", "questions", "mark drawn", "not drawn"],
            [
                _shape_row(shape, [marks[way]["groups"][shape] for way in ("kept", "removed")])
                for shape in marks["kept"]["groups"]
            ],
            _shape_row("all", [marks["kept"], marks["removed"]]),
        ),
        num_items=min(split["num_items"] for split in splits.values()),
        vip_bench=_vip_bench(splits),
        cards=map(_card, content.examples),
        seconds=", ".join(f"{part} {_duration(value)}" for part, value in content.seconds.items()),
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items()),
    )
    write_whole(path, page("ViP-LLaVA quick start", body, "style.css"))


def _bar(name: str, of: Mapping[str, Any], kind: str) -> Bar:
    correct = round(of["score"] * of["num_items"])
    if of["low"] is None:  # too few questions for one
        label = f"{name}: {_percent(of)}, {correct} of {of['num_items']}"
        return Bar(label, of["score"], of["score"], of["score"], kind)
    interval = f"{100 * of['low']:.1f} to {100 * of['high']:.1f}"
    label = f"{name}: {_percent(of)} ({interval}), {correct} of {of['num_items']}"
    return Bar(label, of["score"], of["low"], of["high"], kind)


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f}"


def _times_100(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _loss(number: int, stage: str, curve: Sequence[tuple[int, float]]) -> Html:
    average = smooth(curve)
    return markup(
        _TEMPLATES["loss"],
        number=number,
        stage=stage,
        first=f"{average[0][1]:.2f}",
        last=f"{average[-1][1]:.2f}",
        what=_STAGES.get(stage),
        chart=loss_chart(stage, curve),
    )


def _shape_row(shape: str, ways: Sequence[Mapping[str, Any]]) -> list[Html | str | int]:
    cells = [_score_cell(*(_times_100(of[key]) for key in ("score", "low", "high"))) for of in ways]
    return [shape, ways[0]["num_items"], *cells]


def _vip_bench(splits: Mapping[str, Any]) -> Html:
    names = dict.fromkeys(name for split in splits.values() for name in split["by_capability"])
    cells = {name: [s["by_capability"].get(name) for s in splits.values()] for name in names}
    return table(
        ["capability", *splits],
        [
            [_CAPABILITIES.get(name, name), *(_score_cell(cell and cell["score"]) for cell in row)]
            for name, row in cells.items()
        ],
        ["total", *(_score_cell(s["total"], s["low"], s["high"]) for s in splits.values())],
    )


def _card(example: Example) -> Html:
    question, _, suffix = example.question.partition("\n")
    image, alt = example.image, f"Scene with a {example.shape}"
    return markup(
        _TEMPLATES["card"],
        image=embed_image(image, alt, ' loading="lazy"', lossless=True),
        question=question,
        suffix=markup('<p class="suffix soft">{}</p>', suffix) if suffix else None,
        answer=example.answer,
        marked=_verdict(example.marked, example.answer),
        unmarked=_verdict(example.unmarked, example.answer),
    )


def _verdict(prediction: str | None, answer: str) -> Html:
    if prediction is None:
        return markup('<span class="soft">not asked</span>')
    # As the benchmark does: the whole answer, case aside.
    said, truth = prediction.strip().lower(), answer.lower()
    # The sign says it to those who do not see red and green apart.
    kind, sign = ("right", "\u2713") if said == truth else ("wrong", "\u2717")
    shown = '<span class="verdict {}">{} {}</span>'
    return markup(shown, kind, sign, prediction or "(nothing)")


def _score_cell(score: float | None, low: float | None = None, high: float | None = None) -> Html:
    if score is None:
        return escape("\u2013")
    if low is None or high is None:
        return escape(f"{score:.1f}")
    return markup('{}<span class="soft"> {}</span>', f"{score:.1f}", f"{low:.0f}\u2013{high:.0f}")


def _percent(of: Mapping[str, Any]) -> str:
    return f"{100 * of['score']:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
