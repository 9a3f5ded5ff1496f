"""How much work marks are to draw: a few fields of a request could ask for minutes of it.

Pillow draws lines and polygons without giving way to other threads, so one drawing could hold up
every stream of the server. The weights are measured: a unit is some three nanoseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from vipllava.types import Point, RunLengths, Stroke, VisualPromptPlan
from vipllava.visual_prompts.marks import Mark
from vipllava.visual_prompts.shapes import mark_bounds

MOST_WORK: Final = 1_000_000_000
"""Seconds: twenty marks that each cover the largest photograph, or a thousand usual ones."""
_LAYER: Final = 1.0  # a pixel of a mark's bounds
_LINE: Final = 0.5  # a pixel of a line
_CROSSING: Final = 50.0  # an edge of a filled polygon on one row
_BRUSH: Final = 0.2  # a pixel that a contour's brush passes
_SWEEP: Final = 100.0  # a row that it passes along an edge
_RUNS: Final = 2.0  # a pixel of a mask that is decoded


def decoding_work(marks: Sequence[Mark]) -> float:
    """Return what decoding the masks of marks takes, which comes before a plan, in the same units.

    Args:
        marks: with masks of an image's size; those of another one are refused without work.
    """
    sizes = (mark.rle.size for mark in marks if isinstance(mark.rle, RunLengths))
    return _RUNS * sum(height * width for height, width in sizes)


def drawing_work(plan: VisualPromptPlan) -> float:
    """Return what drawing a plan takes, in units of a pixel that is painted once."""
    width, height = plan.size
    work = 0.0
    for prompt in plan.prompts:
        x1, y1, x2, y2 = mark_bounds(prompt)
        across = max(0.0, min(x2, width) - max(x1, 0)) + 1
        down = max(0.0, min(y2, height) - max(y1, 0)) + 1
        work += _LAYER * across * down
        work += sum(_work_of(stroke, across, down) for stroke in prompt.strokes)
    return work


def _work_of(stroke: Stroke, across: float, down: float) -> float:
    area, side = across * down, stroke.width
    if stroke.kind in ("box", "ellipse"):
        (x1, y1), (x2, y2) = stroke.points
        return _LAYER * min(area, (x2 - x1 + 1) * (y2 - y1 + 1))
    edges = _edges(stroke.points, closed=stroke.kind != "line")
    if stroke.kind == "polygon" and side == 0:
        return _CROSSING * sum(_rows(edge, down) for edge in edges)
    if stroke.kind == "contour":
        return sum(
            _BRUSH * min(area, (math.dist(*edge) + side) * (side + 1))
            + _SWEEP * min(_rows(edge, down) + side, down)
            for edge in edges
        )
    return _LINE * sum(min(area, (math.dist(*edge) + side + 10) * (side + 1)) for edge in edges)


def _rows(edge: tuple[Point, Point], down: float) -> float:
    return min(abs(edge[1][1] - edge[0][1]), down) + 1


def _edges(points: Sequence[Point], closed: bool) -> Iterator[tuple[Point, Point]]:
    yield from pairwise(points)
    if closed and points:
        yield points[-1], points[0]
