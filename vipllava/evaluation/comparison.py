"""Two and more evaluations of the same items: which differences the items can show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from vipllava.evaluation.bench import Prediction
from vipllava.evaluation.journal import (
    METRICS,
    by_dotted_names,
    predictions_path,
    read_predictions,
)
from vipllava.evaluation.statistics import (
    LEVEL,
    Estimate,
    PairedDifference,
    bounds_of,
    holm,
    items_by_group,
    mean_estimate,
    paired_difference,
)
from vipllava.types import VipLlavaError

_MOST_NAMED: Final = 5
_SAME_JUDGE: Final = tuple(
    f"judge.{name}" for name in ("base_url", "seed", "runs", "reported", "prompt_source")
)
"""Settings of a judge that leave it the same one: its model, with the same prompt."""
_SCORE: Final = "bench.score"
_UNSET: Final = "-"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation as its folder has it."""

    folder: Path
    bench: str
    settings: Mapping[str, Any]  # by dotted names, e.g. ``judge.model``
    items: Mapping[str, Prediction]  # by key; their score is what is compared
    metric: str | None = None  # what the score is; None: not known

    @property
    def is_judged(self) -> bool:
        """Whether a judge gave the scores."""
        return any(name.startswith("judge.") for name in self.settings)


def read_evaluation(folder: Path, score: str = "score") -> Evaluated:
    """Read the folder of an evaluation that has ended.

    Args:
        folder: with ``metrics.json`` and ``predictions.jsonl``.
        score: which figure of the items is compared.

    Raises:
        VipLlavaError: a file is missing or damaged, or no item has such a figure.
    """
    path = folder / METRICS
    try:
        metrics: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VipLlavaError(
            f"there is no {path}: name the folder of an evaluation that has ended, such as "
            "runs/eval/NAME/BENCH"
        ) from None
    except (OSError, ValueError) as error:
        raise VipLlavaError(f"cannot read {path}: {error}; evaluate again") from error
    fields = cast("dict[str, Any]", metrics) if isinstance(metrics, dict) else {}
    bench, settings = fields.get("bench"), fields.get("settings")
    if not isinstance(bench, str) or not isinstance(settings, dict):
        raise VipLlavaError(
            f"{path} has no `bench` with a name, or no `settings`: written by an earlier version? "
            "Evaluate again"
        )
    path = predictions_path(folder, "kept")
    items = read_predictions(path)
    if not items:
        raise VipLlavaError(f"{path} has no items with their marks kept; evaluate again")
    if score != "score":
        known = dict.fromkeys(name for item in items.values() for name in item.more)
        if score not in known:
            raise VipLlavaError(f"{path} has no {score}; it has {', '.join(('score', *known))}")
        items = {key: replace(each, score=each.more.get(score)) for key, each in items.items()}
    metric = None if (given := fields.get("metric")) is None else str(given)
    settings = by_dotted_names(cast("dict[str, Any]", settings))
    return Evaluated(folder, bench, settings, items, metric)


@dataclass(frozen=True, slots=True)
class Row:
    """The paired items of a group, or all of them."""

    first: Estimate
    other: Estimate
    difference: PairedDifference  # other - first
    p_corrected: float | None  # by Holm

    @property
    def shown(self) -> str | None:
        """``higher`` or ``lower``, or None: no difference that these items can show.

        Both must show it, the interval and the corrected p-value: with few images an interval is
        too narrow, and with several models or groups one of them excludes 0 by chance. Where all
        items changed alike there is no interval, and the p-value says it.
        """
        of = self.difference.estimate
        if of.value is None or self.p_corrected is None or self.p_corrected > LEVEL:
            return None
        low, high = (of.value if end is None else end for end in (of.low, of.high))
        return "higher" if low > 0 else "lower" if high < 0 else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One evaluation against the first one."""

    folder: str
    total: Row
    groups: Mapping[str, Row]
    num_unscored_first: int  # left out: in both, without a score in the first
    num_unscored_other: int
    num_only_first: int  # left out: not in the other
    num_only_other: int


@dataclass(frozen=True, slots=True)
class Compared:
    """All evaluations against the first one."""

    bench: str
    first: str  # its folder
    is_share: bool  # all scores are 0 or 1
    settings: Mapping[str, Sequence[Any]]  # those that differ, in the order of the folders
    comparisons: Sequence[Comparison]


def compare(
    evaluations: Sequence[Evaluated],
    *,
    common: bool = False,
    allow_different_judges: bool = False,
    seed: int = 0,
) -> Compared:
    """Compare every evaluation with the first one, item by item.

    p-values are corrected for the number of models; those of groups for models times groups.

    Args:
        evaluations: two or more.
        common: compare the items that both have, where they have not the same.
        allow_different_judges: compare scores of different judges, too.
        seed: of the resampling.

    Raises:
        VipLlavaError: benchmarks, metrics, items or judges differ; the message names them.
    """
    if len(evaluations) < 2:
        raise VipLlavaError("one evaluation cannot be compared; name two folders or more")
    first, *others = evaluations
    settings = _different_settings(evaluations)
    for other in others:
        _check_metrics(first, other)
    _check_judges(evaluations, settings, allowed=allow_different_judges)
    comparisons = [_compare_two(first, other, common, seed) for other in others]
    rows = [row for each in comparisons for row in each.groups.values()]
    corrected = iter(_correct(rows))
    totals = _correct([each.total for each in comparisons])
    return Compared(
        first.bench,
        str(first.folder),
        all(item.score in (None, 0, 1) for each in evaluations for item in each.items.values()),
        settings,
        [
            replace(each, total=total, groups={name: next(corrected) for name in each.groups})
            for each, total in zip(comparisons, totals, strict=True)
        ],
    )


def _compare_two(first: Evaluated, other: Evaluated, common: bool, seed: int) -> Comparison:
    only_first = [key for key in first.items if key not in other.items]
    only_other = [key for key in other.items if key not in first.items]
    if (only_first or only_other) and not common:
        raise VipLlavaError(
            f"not the same items: {_named(only_first)} only in {first.folder}, "
            f"{_named(only_other)} only in {other.folder}; --common compares those of both"
        )
    pairs = [(item, other.items[key]) for key, item in first.items.items() if key in other.items]
    if not pairs:
        raise VipLlavaError(f"{first.folder} and {other.folder} have no item in common")
    _check_items(first, other, pairs)
    items, before, after = list[Prediction](), list[float](), list[float]()
    for a, b in pairs:
        if a.score is not None and b.score is not None:
            items.append(replace(a, groups=tuple(name for name in a.groups if name in b.groups)))
            before.append(a.score)
            after.append(b.score)

    bounds = bounds_of(before + after)

    def row(members: Iterable[int]) -> Row:
        chosen = list(members)
        images = [items[at].image for at in chosen]
        a, b = ([of[at] for at in chosen] for of in (before, after))
        difference = paired_difference(a, b, images, seed=seed)
        mean_a, mean_b = (mean_estimate(of, images, bounds=bounds, seed=seed) for of in (a, b))
        return Row(mean_a, mean_b, difference, difference.p_value)

    groups = items_by_group([item.groups for item in items])
    return Comparison(
        str(other.folder),
        row(range(len(items))),
        {name: row(members) for name, members in groups.items()},
        sum(a.score is None for a, _ in pairs),
        sum(b.score is None for _, b in pairs),
        len(only_first),
        len(only_other),
    )


def _correct(rows: Sequence[Row]) -> list[Row]:
    known = [row.p_corrected for row in rows if row.p_corrected is not None]
    corrected = iter(holm(known))
    return [
        row if row.p_corrected is None else replace(row, p_corrected=next(corrected))
        for row in rows
    ]


def _check_items(
    first: Evaluated, other: Evaluated, pairs: Sequence[tuple[Prediction, Prediction]]
) -> None:
    names = {**first.settings, **other.settings}
    told_alike = all(
        first.settings.get(name) == other.settings.get(name)
        for name in names
        if name.partition(".")[0] in ("encoding", "coordinates")
    )
    # Groups may follow from the marks, as shapes; answers that mention a mark are worded as asked.
    for name in ("image", "ground_truth") if told_alike else ("image",):
        if keys := [a.key for a, b in pairs if getattr(a, name) != getattr(b, name)]:
            raise VipLlavaError(
                f"{_named(keys)} differ in `{name}` between {first.folder} and {other.folder}: the "
                "benchmark's data has changed; evaluate both on the same data"
            )


def _check_metrics(first: Evaluated, other: Evaluated) -> None:
    if first.bench != other.bench:
        raise VipLlavaError(
            f"{first.folder} is of the benchmark {first.bench}, {other.folder} of {other.bench}; "
            "compare evaluations of one benchmark"
        )
    differ = first.settings.get(_SCORE, _UNSET) != other.settings.get(_SCORE, _UNSET)
    # What a judge has graded is called after it, and the check of judges says more about that.
    if not (first.is_judged or other.is_judged) and None not in (first.metric, other.metric):
        differ = differ or first.metric != other.metric
    if not differ:
        return
    score = first.settings.get(_SCORE)
    how = f"its command with {_SCORE}={score} and" if score else "with the metric of the first, and"
    listing = "\n  ".join(
        f"{each.folder}: metric={each.metric or _UNSET}, "
        f"{_SCORE}={each.settings.get(_SCORE, _UNSET)}"
        for each in (first, other)
    )
    raise VipLlavaError(
        "scores of different metrics do not compare, whatever the answers are. Evaluate "
        f"{other.folder} anew: {how} name=NEW_NAME\n  {listing}"
    )


def _check_judges(
    evaluations: Sequence[Evaluated], settings: Mapping[str, Sequence[Any]], *, allowed: bool
) -> None:
    judges = [name for name in settings if name.partition(".")[0] == "judge"]
    if (different := [name for name in judges if name not in _SAME_JUDGE]) and not allowed:
        listing = "\n  ".join(
            f"{each.folder}: "
            + ", ".join(f"{name}={each.settings.get(name, _UNSET)}" for name in different)
            for each in evaluations
        )
        raise VipLlavaError(
            "scores of different judges do not compare: the judge alone can move a total by nine "
            f"points. Judge the answers again by one, or allow it: --different-judges\n  {listing}"
        )


def _different_settings(evaluations: Sequence[Evaluated]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for each in evaluations for name in each.settings)
    values = {name: [each.settings.get(name, _UNSET) for each in evaluations] for name in names}
    return {name: of for name, of in values.items() if any(value != of[0] for value in of)}


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    names = f" ({', '.join(keys[:_MOST_NAMED])}{more})" if keys else ""
    return f"{len(keys)} items{names}"
