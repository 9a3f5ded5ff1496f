"""Every box and every polygon that a record uses, each by itself.

The verdict on a single one is the parser's (:class:`vipllava.records.fields.Fields`); here
all of them are asked, and what a parser lets pass is looked at as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from vipllava.ingest.lint.findings import LintLimits
from vipllava.records.fields import Fields
from vipllava.types import BBox, RecordError

Fault = tuple[str, str]
"""Code and message."""

_BOXES: Final = frozenset(
    ("refcocog", "refcocog-gpt4v", "vg_rel", "vg_rel-gpt4v", "v7w", "pointQA_twice", "regions")
)
_MASKS: Final = frozenset(("refcocog", "refcocog-gpt4v", "regions"))
_PHRASE: Final = re.compile(r"<bbox(\d{1,9})>")
_VCR_TEXTS: Final = ("question", "answer_choices", "rationale_choices")
_VCR_SHORTEST_RING: Final = 4  # shorter ones are left out by the parser, too
_INVALID: Final = "polygon-invalid"
_POLYGONS: Final = "a list of polygons, each a flat list x, y, x, y of at least 3 points"
_TOUCH: Final = 1e-3
"""Pixels within which a vertex lies on an edge: coordinates have two decimals at best."""
_FAR: Final = 1e9
"""Coordinates beyond it count as this far out: their products stay finite."""
_EDGES_AT_ONCE: Final = 512
_Vertices = npt.NDArray[np.float64]


def geometry_faults(fields: Fields, kind: str, limits: LintLimits) -> Iterator[Fault]:
    """Yield the faults of all boxes and polygons that a record of ``kind`` uses.

    Without a readable picture only what needs no picture size is found.
    """
    if kind in _BOXES:
        for number, box in enumerate(_list(fields.record.get("bboxes"))):
            yield from _box(fields, box, f"bboxes[{number}]", limits)
    if kind in _MASKS:
        for number, mask in enumerate(_list(fields.record.get("segmentations"))):
            if mask is not None or kind != "regions":
                yield from _mask(fields, mask, f"segmentations[{number}]", limits)
    if kind == "flickr30k":
        phrases = _list(fields.record.get("bbox"))
        for phrase in caption_phrases(fields.record):
            if phrase < len(phrases):
                for number, box in enumerate(_list(phrases[phrase])):
                    yield from _box(fields, box, f"bbox[{phrase}][{number}]", limits)
    if kind == "vcr":
        yield from _clip(fields, limits)


def caption_phrases(record: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the phrases that a Flickr30k caption marks, each once."""
    caption = record.get("grounding")
    found = _PHRASE.findall(caption) if isinstance(caption, str) else []
    return list(dict.fromkeys(int(number) for number in found))


def _clip(fields: Fields, limits: LintLimits) -> Iterator[Fault]:
    """Yield the faults of the objects of a VCR clip that any of the record's texts mentions."""
    holder: Any = fields.record.get("meta", fields.record)
    if not isinstance(holder, Mapping):
        return
    clip = cast("Mapping[str, Any]", holder)
    boxes, masks = _list(clip.get("boxes")), _list(clip.get("segms"))
    for index in sorted(set(_integers([fields.record.get(name) for name in _VCR_TEXTS]))):
        if 0 <= index < len(boxes):
            yield from _box(fields, boxes[index], f"boxes[{index}]", limits, extra=1)
        if 0 <= index < len(masks):
            for number, ring in enumerate(_list(masks[index])):
                if len(points := _list(ring)) >= _VCR_SHORTEST_RING:
                    yield from _ring(fields, points, f"segms[{index}][{number}]", limits)


def _integers(value: object) -> Iterator[int]:
    for item in _list(value):
        if type(item) is int:
            yield item
        else:
            yield from _integers(item)


def _list(value: object) -> list[Any]:
    """Return a list as it is, nothing for anything else: that is the parser's to refuse."""
    return cast("list[Any]", value) if isinstance(value, list) else []


# One box or polygon.


def _box(
    fields: Fields, value: object, name: str, limits: LintLimits, extra: int = 0
) -> Iterator[Fault]:
    fault, _ = _asked(lambda: fields.bbox(value, name, extra))
    if fault is not None:
        yield from fault
        return
    x1, y1, x2, y2 = cast("BBox", tuple(float(number) for number in _list(value)[:4]))
    width, height = fields.size
    outside = max(-x1, -y1, x2 - width, y2 - height)
    if outside > limits.max_outside_pixels:
        yield (
            "box-clipped",
            f"field `{name}` is {value}; it reaches {outside:g} pixels out of the {width} x "
            f"{height} picture and is cut there: check whether box and picture belong together",
        )


def _mask(fields: Fields, value: object, name: str, limits: LintLimits) -> Iterator[Fault]:
    """Yield the faults of one region's flat polygons."""
    fault, flats = _asked(lambda: fields.as_list(value, name, _POLYGONS, fault=_INVALID))
    yield from fault or ()
    for number, flat in enumerate(_list(flats)):
        where = f"{name}[{number}]"
        fault, points = _asked(partial(_points, fields, flat, where))
        if fault is not None:
            yield from fault
        else:
            yield from _ring(fields, points, where, limits)


def _points(fields: Fields, flat: object, name: str) -> list[tuple[Any, Any]]:
    """Return the points of one flat list."""
    numbers = fields.as_list(flat, name, _POLYGONS, fault=_INVALID)
    if len(numbers) % 2:
        fields.fail(name, numbers, f"an even count of coordinates, not {len(numbers)}", _INVALID)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _ring(fields: Fields, points: list[Any], name: str, limits: LintLimits) -> Iterator[Fault]:
    fault, polygon = _asked(lambda: fields.polygon(points, name))
    if fault is not None:
        yield from fault
        return
    assert polygon is not None
    inside = np.array(polygon)
    shown = f"field `{name}`, {len(points)} points,"
    thin = bounding_area(inside) < limits.min_polygon_area
    if not thin and crosses_itself(np.array(points, dtype=np.float64)):
        yield (
            "polygon-self-crossing",
            f"{shown} has an outline that crosses itself; put its points in order, or split it",
        )
    elif thin or ring_area(inside) < limits.min_polygon_area:
        yield (
            "polygon-degenerate",
            f"{shown} has an area of {ring_area(inside):.3g} square pixels inside the picture; "
            "leave it out or correct it",
        )


def _asked(ask: Callable[[], Any]) -> tuple[list[Fault] | None, Any]:
    """Return the parser's complaint about one box or polygon, or what it read."""
    try:
        return None, ask()
    except RecordError as error:
        # Of a picture that is missing or broken its own check tells.
        mine = error.fault.startswith(("box-", "polygon-"))
        return ([(error.fault, str(error))] if mine else []), None


# Rings.


def ring_area(ring: _Vertices) -> float:
    """Return the area enclosed by ``ring`` [n, 2], square pixels (shoelace formula)."""
    x, y = (ring - ring[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def bounding_area(ring: _Vertices) -> float:
    """Return the area of the box around ``ring`` [n, 2] along its principal axes.

    Next to nothing for points on a line, whichever way the ring goes along it.
    """
    centred = ring - ring.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    along = centred @ axes.T
    return float((along.max(axis=0) - along.min(axis=0)).prod())


def crosses_itself(ring: _Vertices) -> bool:
    """Tell whether the closed outline of ``ring`` [n, 2] crosses itself.

    Touching is not crossing: not at a vertex that two parts of the outline share, not with a
    vertex on an edge, not along overlapping edges. A part that passes through an edge with a
    vertex right on it does cross.
    """
    ring = ring.clip(-_FAR, _FAR)
    ring = ring[np.linalg.norm(ring - np.roll(ring, 1, axis=0), axis=1) > _TOUCH]
    if len(ring) < 4:
        return False
    ends = np.roll(ring, -1, axis=0)
    along = ends - ring
    lengths = np.linalg.norm(along, axis=1)
    side = np.empty((len(ring), len(ring)), dtype=np.int8)
    for first in range(0, len(ring), _EDGES_AT_ONCE):
        block = slice(first, first + _EDGES_AT_ONCE)
        away = ring[None] - ring[block, None]  # [edges, vertices, 2]
        cross = along[block, None, 0] * away[..., 1] - along[block, None, 1] * away[..., 0]
        distance = cross / lengths[block, None]
        side[block] = np.sign(distance) * (np.abs(distance) > _TOUCH)
        onto = (along[block, None] * away).sum(axis=2) / lengths[block, None]
        within = (onto > _TOUCH) & (onto < lengths[block, None] - _TOUCH)
        # A vertex on the inside of an edge, its neighbours on the two sides of it.
        passing = np.roll(side[block], 1, axis=1) * np.roll(side[block], -1, axis=1) < 0
        if bool((within & (side[block] == 0) & passing).any()):
            return True
    # Edge i parts the ends of edge j, and edge j those of edge i.
    parted = side * np.roll(side, -1, axis=1) < 0
    return bool((parted & parted.T).any())
