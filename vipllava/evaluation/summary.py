"""Scored predictions to what ``metrics.json`` holds, and to the table that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vipllava.evaluation.bench import ALL_MARKS, Bench, BenchTable, Prediction
from vipllava.evaluation.statistics import mean_interval, wilson_interval

_LISTED: Final = 20  # of failures


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean of values from 0 to 1, if there is one."""
    if values and set(values) <= {0.0, 1.0}:
        return wilson_interval(round(sum(values)), len(values))
    return _mean_interval(values, 0.0)


def _mean_interval(values: Sequence[float], least: float) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    low, high = mean_interval(values)
    return max(low, least), min(high, 1.0)


def score_of(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the mean score with its interval, the means of the other figures, and the counts."""
    scored = [each for each in predictions if each.score is not None]
    values = [each.score for each in scored if each.score is not None]
    low, high = interval(values)
    more = {
        name: _mean([each.more[name] for each in scored if name in each.more])
        for name in dict.fromkeys(name for each in scored for name in each.more)
    }
    return {
        "score": _mean(values), "low": low, "high": high, **more,
        "num_items": len(values), "num_failures": len(predictions) - len(values),
    }  # fmt: skip


def summarise(predictions: Sequence[Prediction], chance: float | None = None) -> dict[str, Any]:
    """Return scores per marking, each in all and by group, and what several markings tell.

    Args:
        predictions: of all markings, scored.
        chance: the score of a guess; None: that of always saying the commonest right answer.

    Returns:
        ``marks``: per marking what :func:`score_of` returns, with ``groups``, and ``failures``,
        the reasons by key; ``faithfulness`` where there are several markings.
    """
    markings: dict[str, Any] = {}
    for marks in ALL_MARKS:
        if not (own := [each for each in predictions if each.marks == marks]):
            continue
        names = sorted({name for each in own for name in each.groups})
        failed = [each for each in own if each.failure is not None][:_LISTED]
        markings[marks] = {
            **score_of(own),
            "groups": {name: score_of([e for e in own if name in e.groups]) for name in names},
            "failures": {each.key: each.failure for each in failed},
        }
    found: dict[str, Any] = {"marks": markings}
    if faithful := faithfulness(predictions, chance):
        found["faithfulness"] = faithful
    return found


def faithfulness(predictions: Sequence[Prediction], chance: float | None = None) -> dict[str, Any]:
    """Return whether the marks were read; each figure over the items that have both scores.

    Returns:
        ``follows``: the share of items that are right with the marks kept and right with them
        moved, where another answer is. A model that never looks says the same to both: zero.
        ``gap``: how far the score falls with the marks removed, which leaves ``left`` of it, beside
        ``chance``. ``stays``: the share of the right ones that are right when recoloured, too.
    """
    scores: dict[str, dict[str, float]] = {marks: {} for marks in ALL_MARKS}
    for each in predictions:
        if each.score is not None:
            scores[each.marks][each.key] = each.score
    kept, found = scores["kept"], dict[str, Any]()

    def pairs(marks: str) -> list[tuple[float, float]]:
        return [(kept[key], score) for key, score in scores[marks].items() if key in kept]

    if both := pairs("moved"):
        found["follows"] = _share([float(min(pair) >= 1) for pair in both])
    if both := pairs("removed"):
        falls = [first - second for first, second in both]
        low, high = _mean_interval(falls, -1.0)
        found["gap"] = {"score": _mean(falls), "low": low, "high": high, "num_items": len(falls)}
        found["left"] = _mean([second for _, second in both])
        found["chance"] = _commonest(predictions) if chance is None else chance
    if both := [pair for pair in pairs("recoloured") if pair[0] >= 1]:
        found["stays"] = _share([float(second >= 1) for _, second in both])
    return found


def _share(values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {"score": _mean(values), "low": low, "high": high, "num_items": len(values)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _commonest(predictions: Sequence[Prediction]) -> float:
    truths = Counter(
        str(each.ground_truth).strip().casefold()
        for each in predictions
        if each.marks == "kept" and each.score is not None
    )
    return max(truths.values()) / truths.total()


def percent(of: Mapping[str, Any] | None) -> str:
    """Return a score with its interval, e.g. ``48.3 (43.1-53.5)``."""
    if of is None or of["score"] is None:
        return "-"
    value = f"{100 * of['score']:.1f}"
    if of["low"] is None:
        return value
    return f"{value} ({100 * of['low']:.1f}-{100 * of['high']:.1f})"


def score_table(bench: Bench, metrics: Mapping[str, Any]) -> BenchTable:
    """Return a row per group, a column per marking and one for each figure beside the score."""
    markings: Mapping[str, Any] = metrics["marks"]
    first = next(iter(markings.values()))
    counts = ("score", "low", "high", "num_items", "num_failures", "groups", "failures")
    more = [name for name in first if name not in counts]

    def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        known = next(of for of in found.values() if of is not None)
        beside = ("-" if known.get(n) is None else f"{100 * known[n]:.1f}" for n in more)
        return (name, str(known["num_items"]), *map(percent, found.values()), *beside)

    names = dict.fromkeys(name for of in markings.values() for name in of["groups"])
    total = row("all", markings)
    rows = [row(name, {m: of["groups"].get(name) for m, of in markings.items()}) for name in names]
    if len(rows) == 1:  # the same as the total
        rows = []
    return BenchTable(
        f"{bench.name}: {bench.metric} in % (95 %)",
        (
            "",
            "items",
            *markings,
            *(n.replace("_", " ") for n in more),
        ),
        rows,
        total,
        [*_failure_notes(markings), *_faith_notes(metrics), *published_notes(bench)],
    )


def _failure_notes(markings: Mapping[str, Any]) -> list[str]:
    return [
        f"{of['num_failures']} items with marks {marks} have no score and are not counted: "
        "see `failure` in the predictions"
        for marks, of in markings.items()
        if of["num_failures"]
    ]


def _faith_notes(metrics: Mapping[str, Any]) -> list[str]:
    found: Mapping[str, Any] = metrics.get("faithfulness", {})
    notes: list[str] = []
    if "follows" in found:
        notes.append(f"follows the mark to another region: {percent(found['follows'])} %")
    if "gap" in found:
        notes.append(
            f"falls by {percent(found['gap'])} points without the mark, to "
            f"{100 * found['left']:.1f} %; chance is {100 * found['chance']:.1f} %"
        )
    if "stays" in found:
        notes.append(f"stays right when the mark is recoloured: {percent(found['stays'])} %")
    return notes


def published_notes(bench: Bench) -> list[str]:
    """Return a line per published figure."""
    return [
        f"published, {each.model}: "
        + ", ".join(f"{name} {value:g}" for name, value in each.figures.items())
        + f" ({each.source}{f'; graded by {each.judge}' if each.judge else ''})"
        for each in bench.published
    ]
