"""Points in masks and small plane geometry for the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vipllava.types import BBox, Point, Polygon
from vipllava.visual_prompts.mask_pixels import MaskPixels

_ATTEMPTS = 8
_POINTS_PER_ATTEMPT = 64
_RELEASED_ATTEMPTS = 10

Mask = tuple[Polygon, ...] | MaskPixels
"""What is known of a region besides its box: rings, of which none says nothing, or pixels."""


def bounds_of(polygons: Sequence[Polygon]) -> BBox:
    """Return x1, y1, x2, y2 of all vertices."""
    vertices = np.array([vertex for polygon in polygons for vertex in polygon])
    (x1, y1), (x2, y2) = vertices.min(axis=0), vertices.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def contains(polygon: Polygon, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Tell which of ``points`` [n, 2] lie inside ``polygon`` (even-odd rule)."""
    ring = np.array(polygon)
    x1, y1 = ring.T[:, :, None]
    x2, y2 = np.roll(ring, -1, axis=0).T[:, :, None]
    x, y = points.T
    straddles = (y1 > y) != (y2 > y)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        crosses = x < (x2 - x1) * (y - y1) / (y2 - y1) + x1
    return ((straddles & crosses).sum(axis=0) % 2).astype(bool)


def bounds_of_mask(mask: Mask, bbox: BBox) -> BBox:
    """Return x1, y1, x2, y2 of a mask, or ``bbox`` without one."""
    if isinstance(mask, MaskPixels):
        return mask.bounds
    return bounds_of(mask) if mask else bbox


def one_of(mask: Mask, rng: np.random.Generator) -> Mask:
    """Choose one of several rings; pixels stay as they are."""
    if isinstance(mask, MaskPixels) or not mask:
        return mask
    return (mask[int(rng.integers(len(mask)))],)


def sample_points(mask: Mask, bbox: BBox, count: int, rng: np.random.Generator) -> list[Point]:
    """Draw ``count`` points uniformly in a mask, or in ``bbox`` without one.

    Rings add up. Slivers in which bounded rejection finds too little fall back to convex
    combinations of neighbouring vertices, which lie on the outline.
    """
    if isinstance(mask, MaskPixels):
        return mask.sample(count, rng)
    if not mask:
        x1, y1, x2, y2 = bbox
        drawn = rng.uniform((x1, y1), (x2, y2), size=(count, 2))
        return [(float(x), float(y)) for x, y in drawn]
    x1, y1, x2, y2 = bounds_of(mask)
    found: list[Point] = []
    for _ in range(_ATTEMPTS):
        drawn = rng.uniform((x1, y1), (x2, y2), size=(_POINTS_PER_ATTEMPT, 2))
        inside = np.any([contains(polygon, drawn) for polygon in mask], axis=0)
        found.extend((float(x), float(y)) for x, y in drawn[inside])
        if len(found) >= count:
            return found[:count]
    ring = mask[0]
    while len(found) < count:
        index = int(rng.integers(len(ring)))
        (ax, ay), (bx, by) = ring[index - 1], ring[index]
        share = float(rng.uniform())
        found.append((ax + share * (bx - ax), ay + share * (by - ay)))
    return found


def sample_central_point(
    mask: Mask, bbox: BBox, rng: np.random.Generator, *, released: bool = False
) -> Point:
    """Draw a point near the centre of the box, or of the mask and in it; of rings in one of them.

    Gaussian around the centre of the bounds, sigma an eighth of their extent. ``released`` takes
    the square root of that, in pixels, and after ten points outside of the polygon the next one
    wherever it lies, as the released code does, which knows polygons only.
    """
    mask = one_of(mask, rng)
    x1, y1, x2, y2 = bounds_of_mask(mask, bbox)
    centre, sigma = ((x1 + x2) / 2, (y1 + y2) / 2), np.array(((x2 - x1) / 8, (y2 - y1) / 8))
    attempts = _POINTS_PER_ATTEMPT
    if released:
        sigma, attempts = np.sqrt(sigma), _RELEASED_ATTEMPTS
    drawn = rng.normal(centre, sigma, size=(attempts, 2))
    if isinstance(mask, MaskPixels):
        inside, released = mask.contains(drawn), False
    elif mask:
        inside = contains(mask[0], drawn)
    else:
        inside = np.all((drawn >= (x1, y1)) & (drawn <= (x2, y2)), axis=1)
    if inside.any() or released:
        x, y = drawn[inside][0] if inside.any() else rng.normal(centre, sigma)
        return float(x), float(y)
    return sample_points(mask, (x1, y1, x2, y2), 1, rng)[0]


def largest_angle(triangle: Sequence[Point]) -> float:
    """Return the largest inner angle in degrees; 180 for collinear or coinciding points."""
    corners = np.array(triangle)
    angles: list[float] = []
    for index in range(3):
        a = corners[index - 1] - corners[index]
        b = corners[(index + 1) % 3] - corners[index]
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        if lengths == 0.0:
            return 180.0
        angles.append(math.degrees(math.acos(float(np.clip(a @ b / lengths, -1.0, 1.0)))))
    return max(angles)


def cubic_bezier(control: Sequence[Point], count: int) -> tuple[Point, ...]:
    """Return where a cubic Bezier curve of 4 control points comes into a new pixel.

    It is followed in ``count`` equal steps of its parameter; first and last point always count.
    """
    t = np.linspace(0.0, 1.0, max(2, count))[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1)
    curve = basis @ np.array(control)
    is_new = np.any(np.diff(np.trunc(curve), axis=0) != 0, axis=1)
    is_new[-1] = True
    return tuple((x, y) for x, y in curve[np.concatenate([[True], is_new])].tolist())
