"""Benchmarks that ask nothing: an item is right if several others' answers to it are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipllava.evaluation.bench import Marks, Prediction
from vipllava.evaluation.journal import METRICS, predictions_path, read_predictions, read_settings
from vipllava.types import VipLlavaError


def joined_settings(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the settings that evaluations of several benchmarks have in common.

    Args:
        folders: of the evaluations, by benchmark.

    Raises:
        VipLlavaError: one is not there, or they were made with different settings; names them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        if not (folder / METRICS).is_file():
            raise VipLlavaError(
                f"{folder} holds no finished evaluation of {name}, which this one joins: evaluate "
                f"bench=[{','.join(folders)}] with the same checkpoint and paths.runs first"
            )
        found[name] = read_settings(folder)
    first, *others = found.values()
    for other in others:
        names = [n for n in {**first, **other} if n != "bench" and first.get(n) != other.get(n)]
        if names:
            raise VipLlavaError(
                f"{' and '.join(map(str, folders.values()))} differ in {', '.join(names)}: "
                "evaluate both with the same settings"
            )
    return {"bench": {name: each["bench"] for name, each in found.items()}} | {
        name: value for name, value in first.items() if name != "bench"
    }


def join(folders: Mapping[str, Path], marks: Marks) -> list[Prediction]:
    """Return a prediction per key, whose score is the lowest of those of all benchmarks.

    Raises:
        VipLlavaError: not all have the same items; lists some.
    """
    files = {
        name: read_predictions(predictions_path(folder, marks)) for name, folder in folders.items()
    }
    everywhere = set.intersection(*(set(rows) for rows in files.values()))
    for name, rows in files.items():
        if alone := [key for key in rows if key not in everywhere]:
            raise VipLlavaError(
                f"{len(alone)} items of {folders[name]} are not in all of {', '.join(folders)}, "
                f"e.g. {', '.join(alone[:5])}: evaluate all with the same data and limit"
            )
    return [_joined([rows[key] for rows in files.values()]) for key in next(iter(files.values()))]


def _joined(parts: list[Prediction]) -> Prediction:
    first, scores = parts[0], [each.score for each in parts]
    known = [score for score in scores if score is not None]
    failures = [each.failure for each in parts if each.failure]
    return Prediction(
        key=first.key,
        image=first.image,
        marks=first.marks,
        question="\n".join(each.question for each in parts),
        ground_truth=[each.ground_truth for each in parts],
        groups=first.groups,
        record_id=first.record_id,
        answer=json.dumps([each.answer for each in parts], ensure_ascii=False),
        score=min(known) if len(known) == len(parts) else None,
        failure="; ".join(failures) or None,
    )
