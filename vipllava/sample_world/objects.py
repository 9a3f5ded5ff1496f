"""The named objects of the sample world, as polygons in a unit square (y grows downwards).

Each drawing is a list of parts painted in order. Parts that belong to the silhouette are the
object's exact mask; the others are details inside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vipllava.types import RGB, Polygon


@dataclass(frozen=True, slots=True)
class Part:
    """One painted polygon; ``fill`` is an RGB value or None for the object's body colour."""

    polygon: Polygon
    fill: RGB | None = None
    silhouette: bool = True


@dataclass(frozen=True, slots=True)
class Drawing:
    """How one kind of object looks."""

    category: str  # what the object is, for the knowledge questions
    bodies: tuple[RGB, ...]  # body colours to choose from
    parts: tuple[Part, ...]  # polygons in painting order


def ellipse(cx: float, cy: float, rx: float, ry: float, count: int = 20) -> Polygon:
    """Return an ellipse as a polygon of ``count`` vertices, from its centre and radii."""
    angles = [2 * math.pi * index / count for index in range(count)]
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


def _box(x1: float, y1: float, x2: float, y2: float) -> Polygon:
    return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))


def _star() -> Polygon:
    ring = [(0.5 if index % 2 == 0 else 0.21, math.pi * index / 5) for index in range(10)]
    turned = [(radius, angle - math.pi / 2) for radius, angle in ring]
    return tuple((0.5 + r * math.cos(angle), 0.52 + r * math.sin(angle)) for r, angle in turned)


def _heart() -> Polygon:
    ring: list[tuple[float, float]] = []
    for index in range(28):
        t = 2 * math.pi * index / 28
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        ring.append((0.5 + x / 34, 0.46 - y / 34))
    return tuple(ring)


def _moon() -> Polygon:
    outer = [math.radians(angle) for angle in range(50, 311, 13)]
    inner = [math.radians(angle) for angle in range(290, 69, -13)]
    return tuple(
        [(0.56 + 0.48 * math.cos(a), 0.5 + 0.48 * math.sin(a)) for a in outer]
        + [(0.74 + 0.38 * math.cos(a), 0.5 + 0.38 * math.sin(a)) for a in inner]
    )


_DARK: Final[RGB] = (40, 40, 48)
_CREAM: Final[RGB] = (245, 238, 220)
_BROWN: Final[RGB] = (110, 70, 40)
_HANDLE: Final[Polygon] = (
    (0.66, 0.34), (0.94, 0.34), (0.94, 0.72), (0.64, 0.72),
    (0.66, 0.62), (0.83, 0.62), (0.83, 0.44), (0.67, 0.44),
)  # fmt: skip

DRAWINGS: Final[dict[str, Drawing]] = {
    "star": Drawing("shape", ((250, 205, 40), (255, 230, 90)), (Part(_star()),)),
    "heart": Drawing("shape", ((225, 40, 70), (240, 110, 150)), (Part(_heart()),)),
    "moon": Drawing("shape", ((235, 230, 190), (200, 205, 230)), (Part(_moon()),)),
    "house": Drawing("building", ((190, 60, 45), (150, 80, 60)), (
        Part(_box(0.14, 0.45, 0.86, 0.96), _CREAM),
        Part(((0.02, 0.48), (0.5, 0.04), (0.98, 0.48))),
        Part(_box(0.42, 0.62, 0.6, 0.96), _BROWN, False),
    )),
    "tree": Drawing("plant", ((35, 130, 55), (90, 160, 50)), (
        Part(((0.42, 0.62), (0.58, 0.62), (0.6, 0.98), (0.4, 0.98)), _BROWN),
        Part(ellipse(0.5, 0.36, 0.42, 0.34)),
    )),
    "mushroom": Drawing("plant", ((205, 45, 35), (170, 95, 55)), (
        Part(((0.38, 0.5), (0.62, 0.5), (0.68, 0.96), (0.32, 0.96)), _CREAM),
        Part(tuple(p for p in ellipse(0.5, 0.54, 0.48, 0.46, 32) if p[1] <= 0.55)),
        Part(ellipse(0.34, 0.34, 0.08, 0.07, 10), _CREAM, False),
        Part(ellipse(0.63, 0.3, 0.09, 0.08, 10), _CREAM, False),
    )),
    "fish": Drawing("animal", ((245, 140, 40), (80, 150, 220)), (
        Part(((0.66, 0.5), (0.98, 0.22), (0.98, 0.78))),
        Part(ellipse(0.4, 0.5, 0.38, 0.26)),
        Part(ellipse(0.2, 0.43, 0.05, 0.05, 10), _DARK, False),
    )),
    "boat": Drawing("vehicle", ((60, 90, 170), (150, 55, 50)), (
        Part(_box(0.46, 0.06, 0.52, 0.66), _BROWN),
        Part(((0.55, 0.1), (0.92, 0.58), (0.55, 0.58)), _CREAM),
        Part(((0.02, 0.66), (0.98, 0.66), (0.8, 0.94), (0.2, 0.94))),
    )),
    "car": Drawing("vehicle", ((200, 40, 50), (50, 110, 190)), (
        Part(((0.2, 0.5), (0.34, 0.24), (0.7, 0.24), (0.84, 0.5))),
        Part(_box(0.02, 0.48, 0.98, 0.74)),
        Part(ellipse(0.25, 0.75, 0.13, 0.13, 16), _DARK),
        Part(ellipse(0.75, 0.75, 0.13, 0.13, 16), _DARK),
        Part(((0.3, 0.46), (0.38, 0.3), (0.66, 0.3), (0.74, 0.46)), (190, 220, 235), False),
    )),
    "cup": Drawing("container", ((240, 240, 245), (70, 160, 150)), (
        Part(((0.1, 0.2), (0.72, 0.2), (0.64, 0.92), (0.18, 0.92))),
        Part(_HANDLE),
        Part(ellipse(0.41, 0.21, 0.31, 0.08), _BROWN),
    )),
}  # fmt: skip

DIGITS: Final[tuple[str, ...]] = tuple("0123456789")
KINDS: Final[tuple[str, ...]] = (*DRAWINGS, *DIGITS)
"""Everything that can stand in a scene; the answers of the short-answer benchmark."""
