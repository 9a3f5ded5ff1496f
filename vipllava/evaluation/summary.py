"""Scored predictions to what ``metrics.json`` holds, and to the table that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, Final

from vipllava.evaluation.bench import ALL_MARKS, Bench, BenchTable, Prediction
from vipllava.evaluation.scoring import STATISTICS
from vipllava.evaluation.statistics import (
    Estimate,
    bounds_of,
    estimate,
    estimate_text,
    mean_estimate,
)
from vipllava.report.evaluation_page import Figure

_LISTED: Final = 20  # of failures


def estimated(
    values: Sequence[float],
    images: Sequence[str],
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> dict[str, Any]:
    """Return the mean of items as ``score`` with the ends of its interval, ``low`` and ``high``.

    Both are None where the items can give no interval, and ``why_no_interval`` says why.
    """
    return _plain(mean_estimate(values, images, bounds=bounds))


def _plain(found: Estimate) -> dict[str, Any]:
    why = found.why_no_interval
    return {
        "score": found.value, "low": found.low, "high": found.high,
        "num_items": found.num_items, "num_images": found.num_images,
    } | ({} if why is None else {"why_no_interval": why})  # fmt: skip


def score_of(predictions: Sequence[Prediction], among: Sequence[Prediction] = ()) -> dict[str, Any]:
    """Return the mean score, see :func:`estimated`, counts, and of other figures each.

    ``among``, those that they are a group of, tell whether the scores end at 1.

    Those are in ``more``, by name; a figure with ``sums`` is the function of these that
    :data:`.scoring.STATISTICS` has, not the mean of its items. ``num_failures`` have no
    score; ``num_empty`` answers say nothing, which is scored as what it is.
    """
    scored = [each for each in predictions if each.score is not None]
    values = [each.score for each in scored if each.score is not None]
    more: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for each in scored for name in each.more):
        having = [each for each in scored if name in each.more]
        if name in STATISTICS:
            sums = [each.sums[name] for each in having]
            more[name] = _plain(estimate(sums, _images(having), STATISTICS[name]))
            continue
        figures = [each.more[name] for each in having]
        more[name] = estimated(figures, _images(having), bounds_of(figures))
    bounds = bounds_of(each.score for each in among or scored if each.score is not None)
    return estimated(values, _images(scored), bounds) | {
        "num_failures": len(predictions) - len(values), "num_empty": num_empty(predictions),
        "more": more,
    }  # fmt: skip


def num_empty(predictions: Sequence[Prediction]) -> int:
    """Return how many answers are without a text; a model that fails may say nothing at all."""
    return sum(each.answer is not None and not each.answer.strip() for each in predictions)


def run_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the ``scores`` of a judge's runs and ``std``, their population deviation, if any."""
    verdicts = [each.verdicts for each in predictions if each.verdicts]
    scores = [fmean(run) for run in zip(*verdicts, strict=True)]
    return {"scores": scores, "std": pstdev(scores)} if scores else {}


def _images(predictions: Sequence[Prediction]) -> list[str]:
    return [each.image for each in predictions]


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
            "groups": {name: score_of([e for e in own if name in e.groups], own) for name in names},
            "failures": {each.key: each.failure for each in failed},
        }
        if runs := run_scores(own):
            markings[marks]["runs"] = runs
    found: dict[str, Any] = {"marks": markings}
    if faithful := faithfulness(predictions, chance):
        found["faithfulness"] = faithful
    return found


def faithfulness(predictions: Sequence[Prediction], chance: float | None = None) -> dict[str, Any]:
    """Return whether the marks were read; each figure over the items that have both scores.

    Returns:
        ``follows``: the share of items that are right with the marks kept and right with them
        moved, where another answer is, and said otherwise: to name every object would be right
        twice. A model that never looks says the same to both: zero.
        ``gap``: how far the score falls with the marks removed, which leaves ``left`` of it, beside
        ``chance``. ``stays``: the share of the right ones that are right when recoloured, too.
    """
    scores: dict[str, dict[str, float]] = {marks: {} for marks in ALL_MARKS}
    for each in predictions:
        if each.score is not None:
            scores[each.marks][each.key] = each.score
    image = {each.key: each.image for each in predictions}
    said = {(each.marks, each.key): (each.answer or "").strip().casefold() for each in predictions}
    kept, found = scores["kept"], dict[str, Any]()

    def pairs(marks: str) -> dict[str, tuple[float, float]]:
        return {key: (kept[key], score) for key, score in scores[marks].items() if key in kept}

    def share(right: Mapping[str, bool]) -> dict[str, Any]:
        return estimated([float(each) for each in right.values()], [image[key] for key in right])

    if both := pairs("moved"):
        found["follows"] = share(
            {
                key: min(pair) >= 1 and said["kept", key] != said["moved", key]
                for key, pair in both.items()
            }
        )
    if both := pairs("removed"):
        falls = [first - second for first, second in both.values()]
        found["gap"] = estimated(falls, [image[key] for key in both], bounds=None)
        found["left"] = sum(second for _, second in both.values()) / len(both)
        found["chance"] = _commonest(predictions) if chance is None else chance
    if both := {key: pair for key, pair in pairs("recoloured").items() if pair[0] >= 1}:
        found["stays"] = share({key: second >= 1 for key, (_, second) in both.items()})
    return found


def _commonest(predictions: Sequence[Prediction]) -> float:
    truths = Counter(
        str(each.ground_truth).strip().casefold()
        for each in predictions
        if each.marks == "kept" and each.score is not None
    )
    return max(truths.values()) / truths.total()


def percent(of: Mapping[str, Any] | None) -> str:
    """Return a score with its interval, e.g. ``48.3 (43.1 to 53.5)``."""
    return "-" if of is None else estimate_text(of["score"], of["low"], of["high"])


def score_table(bench: Bench, metrics: Mapping[str, Any]) -> BenchTable:
    """Return a row per group, a column per marking and one for each figure beside the score."""
    markings: Mapping[str, Any] = metrics["marks"]
    first = next(iter(markings.values()))
    more = list(first["more"])

    def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        known = next(of for of in found.values() if of is not None)
        figures = (known["more"].get(each, {}).get("score") for each in more)
        beside = ("-" if figure is None else f"{100 * figure:.1f}" for figure in figures)
        return (name, str(known["num_items"]), *map(percent, found.values()), *beside)

    names = dict.fromkeys(name for of in markings.values() for name in of["groups"])
    total = row("all", markings)
    rows = [row(name, {m: of["groups"].get(name) for m, of in markings.items()}) for name in names]
    if len(rows) == 1:  # the same as the total
        rows = []
    return BenchTable(
        f"{bench.name}: {bench.metric} in % (95 %)",
        ("", "items", *markings, *(name.replace("_", " ") for name in more)),
        rows,
        total,
        [
            *judge_notes(metrics),
            *_failure_notes(markings),
            *_faith_notes(metrics),
            *published_notes(bench),
        ],
        [figure_of(name, of) for name, of in (*markings.items(), *first["more"].items())],
    )


def figure_of(name: str, of: Mapping[str, Any]) -> Figure:
    """Return a score and its interval in percent."""
    score, low, high = (
        None if of[end] is None else 100 * of[end] for end in ("score", "low", "high")
    )
    return Figure(name, score, low, high, of["num_items"])


def _failure_notes(markings: Mapping[str, Any]) -> list[str]:
    notes: list[str] = []
    for marks, of in markings.items():
        if of["num_failures"]:
            notes.append(
                f"{of['num_failures']} items with marks {marks} have no score and are not counted: "
                "see `failure` in the predictions"
            )
        if of["num_empty"]:
            notes.append(f"{of['num_empty']} answers with marks {marks} are empty, and counted")
    return notes


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


def judge_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line about the judge of the scores, if there was one."""
    judge: Mapping[str, Any] | None = metrics.get("settings", {}).get("judge")
    if judge is None:
        return []
    notes = [
        f"graded by {judge['model']}, revision {judge['revision'] or 'not named'}, "
        f"seed {judge['seed']}, runs {judge['runs']}, prompt {judge['prompt_source']} "
        f"(SHA-256 {judge['prompt_sha256'][:12]})"
    ]
    if len(judge["reported"]) > 1:
        notes.append(f"the judge changed on the way: it reported {judge['reported']}")
    return notes


def published_notes(bench: Bench) -> list[str]:
    """Return a line per published figure."""
    return [
        f"published, {each.model}: "
        + ", ".join(f"{name} {value:g}" for name, value in each.figures.items())
        + f" ({each.source}{f'; graded by {each.judge}' if each.judge else ''})"
        for each in bench.published
    ]
