"""Benchmarks that ask nothing: an item is right if several others' answers to it are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipllava.evaluation.bench import Marks, Prediction
from vipllava.evaluation.journal import (
    METRICS,
    by_dotted_names,
    predictions_path,
    read_predictions,
    read_settings,
)
from vipllava.types import VipLlavaError


def joined_settings(folders: Mapping[str, Path], job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a job and the evaluations that it joins have in common.

    Args:
        folders: of the evaluations, by benchmark.
        job: what the answers would depend on if the job asked them itself.

    Raises:
        VipLlavaError: an evaluation is not there, or was made with other settings than the job's:
            names each with both values.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        if not (folder / METRICS).is_file():
            raise VipLlavaError(
                f"{folder} holds no finished evaluation of {name}, which this one joins: evaluate "
                f"bench=[{','.join(folders)}] with the same checkpoint and paths.runs first"
            )
        found[name] = read_settings(folder)
    wanted = json.loads(json.dumps(job))
    differ = {folders[name]: _differences(each, wanted) for name, each in found.items()}
    if any(differ.values()):
        listing = "\n  ".join(f"{folder}: {'; '.join(of)}" for folder, of in differ.items() if of)
        raise VipLlavaError(
            "the answers to join were given with other settings than this job's: pass the settings "
            f"that they have, or evaluate bench=[{','.join(folders)}] with this job's and "
            f"name=NEW_NAME first, and join with that name\n  {listing}"
        )
    return {**wanted, "bench": {name: each["bench"] for name, each in found.items()}}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs, ``bench`` aside: that names the task and how it is read."""
    a, b = (
        by_dotted_names({name: value for name, value in of.items() if name != "bench"})
        for of in (found, wanted)
    )
    return [
        f"{name}={_shown(a, name)}, now {_shown(b, name)}"
        for name in {**a, **b}
        if _shown(a, name) != _shown(b, name)
    ]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"


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
