"""Shapes of annotation tools as outlines: circles, turned boxes, masks, lines and points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from vipllava.ingest.importing.source import Outline, Size
from vipllava.types import BBox, Point, Polygon, RecordError
from vipllava.visual_prompts.geometry import bounds_of
from vipllava.visual_prompts.rle import Bits, rle_of_mask

_CORNERS: Final = 48
"""Of the polygon that stands for a circle: its area is 0.3 % smaller."""
_HALF: Final = 0.5
"""Pixels around a point or a level line: a box has an area."""


def box(x: float, y: float, width: float, height: float) -> Outline:
    """Return a box of its upper left corner and its size."""
    return Outline((x, y, x + width, y + height))


def corners(first: Point, second: Point) -> Outline:
    """Return a box of two opposite corners, whichever they are, and say if they had to change."""
    (ax, ay), (bx, by) = first, second
    note = None
    if bx < ax or by < ay:
        note = "corners-reversed", f"its corners {first}, {second} were put in order"
    return Outline((min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)), note=note)


def polygon(points: Sequence[Point]) -> Outline:
    """Return a polygon and the box around it."""
    return Outline(polygons=(tuple(points),))


def turned_box(x: float, y: float, width: float, height: float, degrees: float) -> Outline:
    """Return a box turned clockwise about its upper left corner, which stays where it is."""
    if not degrees % 360:
        return box(x, y, width, height)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    ends = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
    return polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in ends])


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Outline:
    """Return an ellipse about its middle, turned clockwise; its box is exact."""
    if rx <= 0 or ry <= 0:
        raise RecordError(f"an ellipse of radii {rx:g} and {ry:g} has no area", "box-empty")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    dx, dy = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    angles = [2 * math.pi * step / _CORNERS for step in range(_CORNERS)]
    ring = [
        (
            x + rx * math.cos(angle) * cos - ry * math.sin(angle) * sin,
            y + rx * math.cos(angle) * sin + ry * math.sin(angle) * cos,
        )
        for angle in angles
    ]
    return Outline((x - dx, y - dy, x + dx, y + dy), (tuple(ring),))


def circle_through(a: Point, b: Point, c: Point) -> Outline:
    """Return the circle on which three points lie."""
    (ax, ay), (bx, by), (cx, cy) = a, b, c
    twice = 2 * (ax * (by - cy) + bx * (cy - ay) + cx * (ay - by))
    if not twice:
        raise RecordError(f"no circle goes through {a}, {b}, {c}: they are in line", "box-empty")
    aa, bb, cc = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
    x = (aa * (by - cy) + bb * (cy - ay) + cc * (ay - by)) / twice
    y = (aa * (cx - bx) + bb * (ax - cx) + cc * (bx - ax)) / twice
    radius = math.hypot(ax - x, ay - y)
    return ellipse(x, y, radius, radius)


def point(x: float, y: float, size: Size) -> Outline:
    """Return the pixel around a point, whose mark is a point, too."""
    width, height = size
    if not (0 <= x <= width and 0 <= y <= height):
        message = f"the point {x:g}, {y:g} is outside its {width} x {height} picture"
        raise RecordError(message, "box-outside")
    return Outline((x - _HALF, y - _HALF, x + _HALF, y + _HALF), shape="point")


def line(points: Sequence[Point]) -> Outline:
    """Return the box around a line, which has no inside, and say so."""
    x1, y1, x2, y2 = bounds_of((tuple(points),))
    wide, high = (_HALF if x1 == x2 else 0.0), (_HALF if y1 == y2 else 0.0)
    around = (x1 - wide, y1 - high, x2 + wide, y2 + high)
    return Outline(around, note=("shape-boxed", "a line: the box around it is the region"))


def mask(bits: Bits) -> Outline:
    """Return a mask of a whole picture, bool [height, width]."""
    return Outline(mask_bounds(bits), rle=rle_of_mask(bits))


def mask_bounds(bits: Bits) -> BBox:
    """Return the box around the pixels of a mask."""
    rows, columns = np.flatnonzero(bits.any(axis=1)), np.flatnonzero(bits.any(axis=0))
    if not len(rows):
        raise RecordError("its mask has no pixel", "mask-invalid")
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return float(left), float(top), float(right), float(bottom)


def placed_mask(patch: Bits, left: int, top: int, size: Size) -> Bits:
    """Return the mask of a whole picture of which a patch is known; what is outside is cut off."""
    width, height = size
    whole = np.zeros((height, width), dtype=np.bool_)
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + patch.shape[1], width), min(top + patch.shape[0], height)
    if x1 < x2 and y1 < y2:
        whole[y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
    return whole


def joined(outlines: Sequence[Outline], masks: Sequence[Bits | None], size: Size) -> Outline:
    """Return one region of several parts, of which some may be masks."""
    notes = [outline.note for outline in outlines if outline.note is not None]
    rings = [ring for outline in outlines for ring in _rings(outline)]
    if not any(bits is not None for bits in masks):
        return Outline(polygons=tuple(rings), note=notes[0] if notes else None)
    canvas = Image.new("1", size)
    for ring in rings:
        ImageDraw.Draw(canvas).polygon(ring, fill=1, outline=1)
    whole = np.array(canvas)
    for bits in masks:
        whole |= False if bits is None else bits
    return mask(whole)


def _rings(outline: Outline) -> tuple[Polygon, ...]:
    if outline.polygons or outline.rle is not None or outline.bbox is None:
        return outline.polygons
    x1, y1, x2, y2 = outline.bbox
    return (((x1, y1), (x2, y1), (x2, y2), (x1, y2)),)
