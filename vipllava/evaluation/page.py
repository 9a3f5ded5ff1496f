"""From an evaluation to what its page shows: figures, what failed, and the worst items."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from PIL import Image

from vipllava.checkpoints.export_meta import code_version
from vipllava.evaluation.asking import Protocol, prepared
from vipllava.evaluation.bench import ALL_MARKS, BenchTable, Item, Marks, Prediction
from vipllava.report.evaluation_page import EvaluationPage, ShownAnswer, ShownItem

_NUM_WORST: Final = 12
_PACKAGES: Final = ("torch", "transformers", "tokenizers", "pillow", "numpy")


def page_content(
    metrics: Mapping[str, Any],
    table: BenchTable,
    predictions: Sequence[Prediction],
    items: Iterable[Item] = (),
    protocol: Protocol | None = None,
    command: str = "",
) -> EvaluationPage:
    """Return what the page of a benchmark shows.

    Args:
        metrics: what ``metrics.json`` holds.
        table: what is printed.
        predictions: of all markings, scored.
        items: the benchmark's, read once more until the worst ones have their images.
        protocol: how they were asked; None shows no images.
        command: which evaluates again.
    """
    worst = worst_keys(predictions)
    images = {} if protocol is None else images_as_asked(worst, items, protocol)
    return EvaluationPage(
        metrics=metrics,
        figures=table.figures,
        title=table.title,
        columns=table.columns,
        rows=table.rows,
        total=table.total,
        num_asked=len(predictions),
        failures=[
            (each.key, each.marks, each.failure or "") for each in predictions if each.score is None
        ],
        worst=[_shown(key, predictions, images) for key in worst],
        versions={"vipllava": code_version(), "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        command=command,
    )


def worst_keys(predictions: Sequence[Prediction], count: int = _NUM_WORST) -> list[str]:
    """Return the keys of the items with the lowest scores, kept marks before others.

    Many are equal: of these the ones whose keys have the lowest hash come first, which are spread
    over the benchmark, and the same ones for every model that fails at them.
    """
    scored = [each for each in predictions if each.score is not None]
    marks = min((each.marks for each in scored), key=ALL_MARKS.index, default=None)
    worst = sorted(
        (each.score, _hash(each.key), each.key) for each in scored if each.marks == marks
    )
    return [key for _, _, key in worst[:count]]


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def images_as_asked(
    keys: Iterable[str], items: Iterable[Item], protocol: Protocol
) -> dict[tuple[str, Marks], tuple[Image.Image, ...]]:
    """Return, by key and marks, the images that the model was shown of some items."""
    missing, found = set(keys), dict[tuple[str, Marks], tuple[Image.Image, ...]]()
    for item in items if missing else ():
        if item.key not in missing:
            continue
        for prediction, request in prepared(item, protocol, protocol.marks):
            if request is not None and request.image is not None:
                found[item.key, prediction.marks] = (request.image, *request.more_images)
        missing.remove(item.key)
        if not missing:
            break
    return found


def _shown(
    key: str,
    predictions: Sequence[Prediction],
    images: Mapping[tuple[str, Marks], Sequence[Image.Image]],
) -> ShownItem:
    own = sorted((e for e in predictions if e.key == key), key=lambda e: ALL_MARKS.index(e.marks))
    return ShownItem(
        key,
        own[0].groups,
        [
            ShownAnswer(
                each.marks,
                images.get((key, each.marks), ()),
                each.question,
                _text(each.ground_truth),
                each.answer,
                each.score,
            )
            for each in own
        ],
    )


def _text(ground_truth: Any) -> str:
    if isinstance(ground_truth, list | tuple):
        return " | ".join(map(str, ground_truth))
    return str(ground_truth)
