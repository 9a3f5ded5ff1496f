"""``predictions.jsonl``: one line per item of an evaluation, as ``vipllava compare`` reads it.

A line is a JSON object with at least the fields of :class:`ScoredItem`; a benchmark may add others.
Beside it, ``metrics.json`` has at least ``bench``, a name, and ``settings``, an object: what the
scores depend on, such as the checkpoint, seed, marks and ``judge`` (its model, revision and the
hash of its prompt).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from vipllava.types import VipLlavaError

PREDICTIONS: Final = "predictions.jsonl"
METRICS: Final = "metrics.json"
_MOST_LISTED: Final = 10
_FIELDS: Final = ("key", "image", "score", "answer", "ground_truth", "groups")


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """An item with its answer and score."""

    key: str  # which names the item in every run of the benchmark
    image: str  # which names its image: items of one image are not independent
    score: float | None  # the higher the better; None: the item failed
    answer: str | None  # the model's text; None: there is none
    ground_truth: Any  # a text, or several
    groups: tuple[str, ...] = ()  # e.g. capabilities

    def line(self, **more: Any) -> str:
        """Return its line of the file; ``more`` are the benchmark's own fields."""
        return json.dumps({**asdict(self), **more}, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation as its folder has it."""

    folder: Path
    bench: str
    settings: Mapping[str, Any]  # by dotted names, e.g. ``judge.model``
    items: Mapping[str, ScoredItem]  # by key


def read_evaluation(folder: Path, score: str = "score") -> Evaluated:
    """Read the folder of an evaluation that has ended.

    Args:
        folder: with ``metrics.json`` and ``predictions.jsonl``.
        score: the field of a line that is compared.

    Raises:
        VipLlavaError: a file is missing or breaks its schema; the message lists lines.
    """
    path = folder / METRICS
    try:
        metrics: Any = json.loads(_read(path))
    except ValueError as error:
        raise VipLlavaError(f"{path} is not JSON: {error}; evaluate again") from error
    fields = cast("dict[str, Any]", metrics) if isinstance(metrics, dict) else {}
    bench, settings = fields.get("bench"), fields.get("settings")
    if not isinstance(bench, str) or not isinstance(settings, dict):
        raise VipLlavaError(
            f"{path} has no `bench` with a name, or no `settings`: written by an earlier version? "
            "Evaluate again"
        )
    items = read_predictions(folder / PREDICTIONS, score)
    return Evaluated(folder, bench, _flat(cast("dict[str, Any]", settings)), items)


def read_predictions(path: Path, score: str = "score") -> dict[str, ScoredItem]:
    """Read the items by key, in the file's order.

    Raises:
        VipLlavaError: it cannot be read, is empty, or lines break the schema; lists them.
    """
    items: dict[str, ScoredItem] = {}
    problems: list[str] = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _parse(line, score)
            if item.key in items:
                raise ValueError(f"the key {item.key} occurs twice")
            items[item.key] = item
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        listing = "\n  ".join(problems[:_MOST_LISTED])
        raise VipLlavaError(
            f"{len(problems)} lines of {path} cannot be used; evaluate again:\n  {listing}"
        )
    if not items:
        raise VipLlavaError(f"{path} has no items; evaluate again")
    return items


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise VipLlavaError(
            f"there is no {path}: name the folder of an evaluation that has ended, such as "
            "runs/eval/NAME/BENCH"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise VipLlavaError(f"cannot read {path}: {error}") from error


def _parse(line: str, score: str) -> ScoredItem:
    """Read a line; every complaint is a ValueError, to which the caller adds file and line."""
    raw: Any = json.loads(line)
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    fields = cast("dict[str, Any]", raw)
    if missing := [name for name in dict.fromkeys((*_FIELDS, score)) if name not in fields]:
        raise ValueError(f"has no {', '.join(missing)}; it has {', '.join(fields)}")
    key, image, answer, groups = (fields[name] for name in ("key", "image", "answer", "groups"))
    for name, value in (("key", key), ("image", image)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}; expected a text")
    if not isinstance(answer, str | None):
        raise ValueError(f"answer is {answer!r}; expected a text or null")
    value = fields[score]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value)):
        raise ValueError(f"{score} is {value!r}; expected a number or null")
    if not isinstance(groups, list) or not all(
        isinstance(group, str) for group in cast("list[Any]", groups)
    ):
        raise ValueError(f"groups is {groups!r}; expected a list of texts")
    number = None if value is None else float(value)
    names = tuple(cast("list[str]", groups))
    return ScoredItem(key, image, number, answer, fields["ground_truth"], names)


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return a nested object by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(cast("dict[str, Any]", value), f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found
