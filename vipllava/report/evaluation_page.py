"""The page of an evaluation: what it scored, how sure that is, and what the model got wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from vipllava.files.atomic import write_whole
from vipllava.report.charts import Bar, bar_chart
from vipllava.report.html import Child, Html, embed_image, markup, page, read_templates, table

_TEMPLATES: Final = read_templates("evaluation.html")
_MOST_FAILURES: Final = 50
_LONGEST_SIDE: Final = 448
"""Pixels of an image on the page: more than the 336 that the network sees of it."""
_MARKS: Final[Mapping[str, str]] = {
    "kept": "marks kept", "removed": "marks removed", "moved": "marks moved",
    "recoloured": "marks recoloured",
}  # fmt: skip
_FACTS: Final[Mapping[str, str]] = {
    "checkpoint": "checkpoint",
    "checkpoint_digest": "digest of its files",
    "endpoint.model": "model",
    "endpoint.revision": "revision",
    "endpoint.base_url": "behind",
    "bench.manifest": "data set",
    "data": "fingerprint of its shards",
    "limit": "only the first items",
    "encoding": "how regions are told",
    "seed": "seed",
    "max_new_tokens": "tokens of an answer at most",
    "dtype": "dtype",
    "device": "device",
}
"""Settings that everybody wants to see, and what they are called."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A score of all items, in the unit of the table: percent, or points from 0 to 100."""

    name: str  # of a marking, a split or a measure
    value: float | None
    low: float | None  # ends of the 95 % interval, if there is one
    high: float | None
    num_items: int  # that have a score


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """A question as it was asked with one marking, and the answer."""

    marks: str
    images: Sequence[Image.Image]  # as the model saw them; none if they cannot be made again
    question: str
    ground_truth: str
    answer: str | None
    score: float | None


@dataclass(frozen=True, slots=True)
class ShownItem:
    """An item with its answers, first the one that it was chosen by."""

    key: str
    groups: Sequence[str]
    answers: Sequence[ShownAnswer]


@dataclass(frozen=True, slots=True)
class EvaluationPage:
    """Everything the page shows."""

    metrics: Mapping[str, Any]  # what ``metrics.json`` holds
    figures: Sequence[Figure]
    title: str  # of the table, says the unit
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # a row per group; texts such as ``48.3 (43.1 to 53.5)``
    total: Sequence[str]
    num_asked: int  # questions, each marking of an item counted
    failures: Sequence[tuple[str, str, str]]  # key, marks and reason of each without a score
    worst: Sequence[ShownItem]
    versions: Mapping[str, str]  # package to version
    command: str = ""  # which evaluates again; empty to leave it out


def write_evaluation_page(path: Path, content: EvaluationPage) -> None:
    """Write the page as one file that needs no other and no network."""
    metrics = content.metrics
    bench, settings = str(metrics["bench"]), _flat(metrics["settings"])
    command = "<dt>to repeat</dt><dd><code>{}</code></dd>"
    body = markup(
        _TEMPLATES["page"],
        bench=bench,
        model=settings.get("checkpoint") or settings.get("endpoint.model"),
        title=content.title,
        num_asked=content.num_asked,
        num_scored=content.num_asked - len(content.failures),
        grader=_grader(metrics),
        hero=_hero(content) if content.figures else None,
        faithfulness=_faithfulness(metrics.get("faithfulness") or {}),
        heading="By group" if content.rows else "Scores",
        groups=table(
            content.columns,
            [[row[0], *map(_cell, row[1:])] for row in content.rows],
            [*content.total[:1], *map(_cell, content.total[1:])],
        ),
        published=_published(content) if metrics.get("published") else None,
        failures=_failures(content) if content.failures else None,
        worst=_worst(content.worst) if content.worst else None,
        facts=_facts(metrics, settings),
        settings=_texts(("setting", "value"), settings.items()),
        command=markup(command, content.command) if content.command else None,
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items()),
    )
    write_whole(path, page(f"{bench}: evaluation", body, "style.css", "evaluation.css"))


def _hero(content: EvaluationPage) -> Html:
    first, metrics = content.figures[0], content.metrics
    chance: float | None = (metrics.get("faithfulness") or {}).get("chance")
    highest = max((each.high or each.value or 0 for each in content.figures), default=0)
    top = 100.0 * max(1, math.ceil(highest / 100))
    shown = [each for each in content.figures if each.value is not None]
    return markup(
        _TEMPLATES["hero"],
        value=_number(first.value),
        metric=metrics["metric"],
        name=_MARKS.get(first.name, first.name),
        interval=f"95 %: {interval}; " if (interval := _interval(first.low, first.high)) else None,
        num_items=first.num_items,
        bars=bar_chart(
            [_bar(each, top) for each in shown],
            top=top,
            unit="",
            reference=None if chance is None else 100 * chance / top,
        ),
        chance=None
        if chance is None
        else markup(_TEMPLATES["chance"], chance=_number(100 * chance)),
    )


def _bar(of: Figure, top: float) -> Bar:
    value = of.value or 0.0
    low, high = (value if end is None else end for end in (of.low, of.high))
    label = f"{_MARKS.get(of.name, of.name)}: {_text(of)}, {of.num_items} items"
    kind = "unmarked" if of.name == "removed" else "marked"
    return Bar(label, value / top, low / top, high / top, kind)


def _faithfulness(found: Mapping[str, Any]) -> Html | None:
    tiles = [
        markup(
            _TEMPLATES[name],
            number=_percent(of["score"]),
            interval=_interval(_times_100(of["low"]), _times_100(of["high"])) or "no interval",
            num_items=of["num_items"],
            left=_percent(found.get("left")),
            chance=_percent(found.get("chance")),
        )
        for name in ("follows", "gap", "stays")
        if (of := found.get(name))
    ]
    return markup(_TEMPLATES["faithfulness"], tiles=tiles) if tiles else None


def _published(content: EvaluationPage) -> Html:
    metrics = content.metrics
    published: Sequence[Mapping[str, Any]] = metrics["published"]
    names = list(dict.fromkeys(name for each in published for name in each["figures"]))
    ours = {each.name.lower(): each for each in content.figures}
    if content.figures:
        ours.setdefault(str(metrics["metric"]).lower(), content.figures[0])
    remarks = ["As their sources print them."]
    if any(each["judge"] not in (None, _judge(metrics).get("model")) for each in published):
        remarks.append(
            "Another judge is another scale: the same answers can differ by nine points between "
            "two judges, so figures of another judge do not compare with this run's."
        )
    if metrics["settings"].get("limit") is not None:
        remarks.append("This run has only a part of the items.")
    return markup(
        _TEMPLATES["published"],
        remark=" ".join(remarks),
        table=table(
            ["", *names],
            [
                [
                    _model(
                        each["model"],
                        each["source"],
                        f"graded by {each['judge']}" if each["judge"] else "",
                    ),
                    *(_number(each["figures"].get(name)) for name in names),
                ]
                for each in published
            ],
            [
                _model("this run", f"graded {_grader(metrics)}"),
                *(_cell(_text(ours[n])) if n in ours else "\u2013" for n in map(str.lower, names)),
            ],
        ),
    )


def _model(name: str, *about: str) -> Html:
    shown = "; ".join(filter(None, about))
    return markup('{}<span class="source soft">{}</span>', name, shown)


def _grader(metrics: Mapping[str, Any]) -> str:
    if not (judge := _judge(metrics)):
        return f"without a judge: {metrics['metric']}"
    changed = "; it changed on the way" if len(judge["reported"]) > 1 else ""
    return (
        f"by {judge['model']}, revision {judge['revision'] or 'not named'}, prompt "
        f"{judge['prompt_source']} (SHA-256 {judge['prompt_sha256'][:12]}){changed}"
    )


def _judge(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model that graded, with all that is known of it, or nothing."""
    return metrics["settings"].get("judge") or {}


def _failures(content: EvaluationPage) -> Html:
    count = len(content.failures)
    listed = f" The first {_MOST_FAILURES}:" if count > _MOST_FAILURES else ""
    return markup(
        _TEMPLATES["failures"],
        count=count,
        num_asked=content.num_asked,
        listed=listed,
        table=_texts(("item", "marks", "reason"), content.failures[:_MOST_FAILURES]),
    )


def _worst(items: Sequence[ShownItem]) -> Html:
    answers = [answer for item in items for answer in item.answers]
    have_images = any(answer.images for answer in answers)
    return markup(
        _TEMPLATES["worst"],
        count=len(items),
        images="Images as the model saw them; a click enlarges one." if have_images else None,
        width="wide" if len(answers) > len(items) else None,
        items=map(_item, items),
    )


def _item(item: ShownItem) -> Html:
    first = item.answers[0]
    return markup(
        _TEMPLATES["item"],
        key=item.key,
        groups=[markup('<span class="badge">{}</span>', group) for group in item.groups],
        question=first.question,
        truth=first.ground_truth,
        views=[_view(item, answer) for answer in item.answers],
    )


def _view(item: ShownItem, answer: ShownAnswer) -> Html:
    first, alt = item.answers[0], f"{item.key}, {_MARKS.get(answer.marks, answer.marks)}"
    differs: list[Html] = []
    if answer.ground_truth != first.ground_truth:
        right = '<div class="soft">right: {}</div>'
        differs.append(markup(right, answer.ground_truth))
    if answer.question != first.question:
        differs.append(markup('<div class="soft">asked: {}</div>', answer.question))
    return markup(
        _TEMPLATES["view"],
        images=[
            markup(_TEMPLATES["image"], image=_embedded(image, alt)) for image in answer.images
        ],
        marks=None
        if len(item.answers) == 1 and answer.marks == "kept"
        else markup('<div class="marks">{}</div>', _MARKS.get(answer.marks, answer.marks)),
        verdict=_verdict(answer),
        differs=differs,
    )


def _embedded(image: Image.Image, alt: str) -> Html:
    small = image.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return embed_image(small, alt, ' decoding="async"', quality=90)


def _verdict(answer: ShownAnswer) -> Html:
    if answer.answer is None:
        return markup('<span class="soft">no answer</span>')
    said = answer.answer or "(nothing)"
    if answer.score is None:
        return markup('{} <span class="soft">no score</span>', said)
    if answer.score not in (0, 1):
        return markup('{} <span class="soft">{}</span>', said, f"{answer.score:.2f}")
    # The sign says it to those who do not see red and green apart.
    kind, sign = ("right", "\u2713") if answer.score else ("wrong", "\u2717")
    return markup('<span class="verdict {}">{} {}</span>', kind, sign, said)


def _facts(metrics: Mapping[str, Any], settings: Mapping[str, str]) -> list[Html]:
    fact = "<div><dt>{}</dt><dd>{}</dd></div>"
    grading = {f"judge: {name}": value for name, value in _flat(_judge(metrics)).items()}
    facts = {
        "graded": _grader(metrics),
        **grading,
        **{label: settings[name] for name, label in _FACTS.items() if name in settings},
    }
    return [markup(fact, name, value) for name, value in facts.items() if value != "null"]


def _texts(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Build a table of texts, which break where they are long."""

    def row(cells: Sequence[str]) -> Html:
        first, *others = cells
        shown = [markup("<td>{}</td>", cell) for cell in others]
        return markup('<tr><th scope="row">{}</th>{}</tr>', first, shown)

    return markup(
        '<div class="scroll"><table class="texts"><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>",
        [markup('<th scope="col">{}</th>', each) for each in head],
        map(row, rows),
    )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested settings by dotted names, each as a text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = _plain(value)
    return found


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> Child:
    """Set an interval behind a number apart."""
    value, bracket, rest = text.partition(" (")
    return markup('{}<span class="soft"> ({}</span>', value, rest) if bracket else text


def _text(of: Figure) -> str:
    interval = _interval(of.low, of.high)
    return f"{_number(of.value)} ({interval})" if interval else _number(of.value)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}".replace("-", "\u2212")


def _percent(share: float | None) -> str:
    return _number(_times_100(share))


def _times_100(share: float | None) -> float | None:
    return None if share is None else 100 * share
