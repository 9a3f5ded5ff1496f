"""Random records of every kind with regions, for properties that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.toy_data import said
from vipllava.visual_prompts.shapes import PALETTE

Rng = np.random.Generator
Size = tuple[int, int]
Record = dict[str, Any]


def box(rng: Rng, size: Size) -> list[float]:
    """Return a box of at least 8 pixels a side, whole numbers half of the time."""
    sides: list[tuple[float, float]] = []
    for length in size:
        extent = rng.uniform(8, length)
        start = rng.uniform(0, length - extent)
        sides.append((float(start), float(start + extent)))
    (x1, x2), (y1, y2) = sides
    numbers = [x1, y1, x2, y2]
    return [int(n) for n in (x1, y1, x2 + 1, y2 + 1)] if rng.random() < 0.5 else numbers


def rings(rng: Rng, bbox: list[float]) -> list[list[float]]:
    """Return one or two polygons in the box, flat x, y lists."""
    x1, y1, x2, y2 = bbox
    count = int(rng.integers(4, 12))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count)) if rng.random() < 0.3 else None
    angles = np.arange(count) * 2 * np.pi / count if angles is None else angles
    centre, radius = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1]) / 2
    points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    flat = [float(n) for n in points.ravel()]
    corner = [x1, y1, (x1 + x2) / 2, y1, x1, (y1 + y2) / 2]
    return [flat, corner] if rng.random() < 0.3 else [flat]


def _marked(rng: Rng, size: Size, count: int) -> Record:
    boxes = [box(rng, size) for _ in range(count)]
    return {"bboxes": boxes, "segmentations": [rings(rng, bbox) for bbox in boxes]}


def _boxes(rng: Rng, size: Size, count: int) -> list[list[float]]:
    return [box(rng, size) for _ in range(count)]


def refcocog(rng: Rng, size: Size) -> Record:
    """One object, a phrase."""
    return {"id": "refcocog-1", **_marked(rng, size, 1), "answer": "a cup"}


def refcocog_gpt4v(rng: Rng, size: Size) -> Record:
    """One object, a dialogue."""
    talk = said("<image>\nWho is <bbox>?", "The man <bbox> sings.", "Why <bbox>?", "He is happy.")
    return {"id": "refcocog-gpt4v-1", **_marked(rng, size, 1), "conversations": talk}


def vg_rel(rng: Rng, size: Size) -> Record:
    """Two objects, a triplet."""
    return {"id": "vg_rel-1", "bboxes": _boxes(rng, size, 2), "answer": "man, riding, horse"}


def vg_rel_gpt4v(rng: Rng, size: Size) -> Record:
    """Two objects, a dialogue."""
    talk = said("Is <bbox1> near <bbox0>?\n<image>", "Yes, <bbox0> is.", "Is it <bbox1>?", "No.")
    return {"id": "vg_rel-gpt4v-1", "bboxes": _boxes(rng, size, 2), "conversations": talk}


def flickr30k(rng: Rng, size: Size) -> Record:
    """Some phrases of some boxes each, one of them unsaid."""
    phrases = [_boxes(rng, size, int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 9)))]
    caption = " and ".join(f"a thing <bbox{n}>" for n in rng.permutation(len(phrases)))
    return {"id": "flickr30k-1", "bbox": [*phrases, [box(rng, size)]], "grounding": f"{caption} ."}


def vcr(rng: Rng, size: Size) -> Record:
    """Up to twelve objects, of which at most nine are spoken of: the palette has no more names."""
    count = int(rng.integers(2, 13))
    spoken = min(count, len(PALETTE))
    boxes = _boxes(rng, size, count)
    segms = [
        [np.reshape(flat, (-1, 2)).tolist() for flat in rings(rng, bbox)]
        if rng.random() < 0.8
        else []
        for bbox in boxes
    ]

    def say() -> list[Any]:
        chosen = rng.permutation(spoken)[: int(rng.integers(1, 4))]
        return ["Is", [int(n) for n in chosen], "near", [int(rng.integers(spoken))], "now", "."]

    return {
        "id": "vcr-1",
        "meta": {"boxes": [[*bbox, 0.9] for bbox in boxes], "segms": segms},
        "class_names": (["person", "dog", "cup"] * 4)[:count],
        "question": say(),
        "answer_choices": [say() for _ in range(4)],
        "answer_label": int(rng.integers(4)),
        "rationale_choices": [say() for _ in range(4)],
        "rationale_label": int(rng.integers(4)),
    }


def v7w(rng: Rng, size: Size) -> Record:
    """Four boxes to choose from."""
    boxes = _boxes(rng, size, 4)
    answer = boxes[int(rng.integers(4))]
    return {"id": "v7w-1", "bboxes": boxes, "question": "Which is a dog?", "answer": answer}


def pointqa_twice(rng: Rng, size: Size) -> Record:
    """One exemplar."""
    question = "How many of these are there?"
    return {
        "id": "pointQA_twice-1",
        "bboxes": [box(rng, size)],
        "general_question": question,
        "answer": 2,
    }


def regions(rng: Rng, size: Size) -> Record:
    """A user's record: several boxes, some with masks, some marks fixed in part."""
    count = int(rng.integers(1, 7))
    marked = _marked(rng, size, count)
    masks = [mask if rng.random() < 0.5 else None for mask in marked["segmentations"]]
    fixed: list[Record | None] = [None] * count
    if rng.random() < 0.5:
        fixed[0] = {"shape": "arrow", "colour": "red", "alpha": 255}
        fixed[-1] = {"colour": "lime", "width": 5}
    asked = " and ".join(f"<bbox{n}>" for n in range(count))
    return {
        "id": "mine",
        "bboxes": marked["bboxes"],
        "segmentations": masks,
        "visual_prompts": fixed,
        "conversations": said(f"<image>\nWhat is {asked}?", "Cups, mostly <bbox0>."),
    }


KINDS: dict[str, Callable[[Rng, Size], Record]] = {
    "refcocog": refcocog,
    "refcocog-gpt4v": refcocog_gpt4v,
    "vg_rel": vg_rel,
    "vg_rel-gpt4v": vg_rel_gpt4v,
    "flickr30k": flickr30k,
    "vcr": vcr,
    "v7w": v7w,
    "pointQA_twice": pointqa_twice,
    "regions": regions,
}
