"""Every box and every polygon that a record uses, each by itself.

The verdict on a single one is the parser's (:class:`vipllava.records.fields.Fields`); here
all of them are asked, and what a parser lets pass is looked at as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from vipllava.ingest.lint.findings import LintLimits, Problem
from vipllava.records import RecordKind
from vipllava.records.fields import Fields
from vipllava.records.kind import Outline
from vipllava.types import RecordError

_TOUCH: Final = 1e-3
"""Pixels within which a vertex lies on an edge: coordinates have two decimals at best."""
_FAR: Final = 1e9
"""Coordinates beyond it count as this far out: their products stay finite."""
_EDGES_AT_ONCE: Final = 512
_Vertices = npt.NDArray[np.float64]


def geometry_problems(fields: Fields, kind: RecordKind, limits: LintLimits) -> Iterator[Problem]:
    """Yield the problems of all boxes and polygons that a record of ``kind`` uses.

    Without a readable image only what needs no image size is found.
    """
    for outline in kind.outlines(fields.record):
        yield from _asked(_CHECKS[outline.form](fields, outline, limits))


def _asked(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Yield the problems of one shape, or the parser's complaint about it."""
    try:
        yield from problems
    except RecordError as error:
        # An image that is missing or broken has a check of its own.
        if error.fault.startswith(("box-", "polygon-")):
            yield Problem(error.fault, str(error))


def _box(fields: Fields, box: Outline, limits: LintLimits) -> Iterator[Problem]:
    fields.bbox(box.value, box.name, box.extra)
    x1, y1, x2, y2 = (float(number) for number in box.value[:4])
    width, height = fields.size
    outside = max(-x1, -y1, x2 - width, y2 - height)
    if outside > limits.max_outside_pixels:
        yield Problem(
            "box-clipped",
            f"field `{box.name}` is {box.value}; it reaches {outside:g} pixels out of the {width} "
            f"x {height} image and is cut there: check whether box and image belong together",
        )


def _mask(fields: Fields, mask: Outline, limits: LintLimits) -> Iterator[Problem]:
    def flat_problems(flat: object, name: str) -> Iterator[Problem]:
        yield from _ring(fields, Outline("ring", fields.points(flat, name), name), limits)

    for name, flat in fields.flats(mask.value, mask.name):
        yield from _asked(flat_problems(flat, name))


def _ring(fields: Fields, ring: Outline, limits: LintLimits) -> Iterator[Problem]:
    points = ring.value
    inside = np.array(fields.polygon(points, ring.name))
    shown = f"field `{ring.name}`, {len(points)} points,"
    thin = bounding_area(inside) < limits.min_polygon_area
    if not thin and crosses_itself(np.array(points, dtype=np.float64)):
        yield Problem(
            "polygon-self-crossing",
            f"{shown} has an outline that crosses itself; put its points in order, or split it",
        )
    elif thin or ring_area(inside) < limits.min_polygon_area:
        yield Problem(
            "polygon-degenerate",
            f"{shown} has an area of {ring_area(inside):.3g} square pixels inside the image; "
            "leave it out or correct it",
        )


_CHECKS: Final = {"box": _box, "mask": _mask, "ring": _ring}


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
