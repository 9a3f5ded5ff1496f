"""The outlines of a mask: rings around its pieces and its holes, through its outermost pixels."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vipllava.types import Polygon

Bits = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]


def outlines_of_mask(mask: Bits) -> tuple[Polygon, ...]:
    """Return the outlines of a mask: around every piece of it, and around every hole.

    Pieces are what touches by sides. The vertices are (the middles of) the last pixels that belong
    to the mask; edges are upright or level.

    Returns:
        Rings, those around most first; none if the mask is empty.
    """
    if not mask.any():
        return ()
    left, top, right, bottom = _bounds(mask)
    padded = np.pad(mask[top : bottom + 1, left : right + 1], 1).astype(np.int8)
    # Corners lie where four pixels meet. Of each the four around it: north-west and so on.
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    around = nw + 2 * ne + 4 * sw + 8 * se
    corners = _corners(around)
    following = _following(corners)
    # Half a pixel into the mask is the middle of a pixel.
    x = corners.x + np.where(corners.mask_is_left, -1, 0) + left
    y = corners.y + np.where(corners.mask_is_above, -1, 0) + top
    points = np.stack([x, y], axis=1).astype(float)
    rings = [points[ring] for ring in _cycles(following.tolist())]
    rings.sort(key=_area, reverse=True)
    return tuple(tuple((x, y) for x, y in ring.tolist()) for ring in rings)


def _bounds(mask: Bits) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


class _Corners(NamedTuple):
    """Where an outline turns, in rows from the top; x and y count from the first pixel's edge."""

    x: _Ints
    y: _Ints
    mask_is_left: Bits  # whether the outline has the mask's pixel to the left of the corner
    mask_is_above: Bits
    edge_is_left: Bits  # whether the level edge of the corner goes to the left
    edge_is_above: Bits


# By the four pixels around a point (1, 2, 4, 8: north-west, north-east, south-west, south-east):
# where the level edge of the corner goes, the upright one, and where the mask's pixel lies.
_TURNS: Final[dict[int, list[tuple[str, str, str]]]] = {
    1: [("left", "above", "nw")],
    2: [("right", "above", "ne")],
    4: [("left", "below", "sw")],
    8: [("right", "below", "se")],
    14: [("left", "above", "se")],
    13: [("right", "above", "sw")],
    11: [("left", "below", "ne")],
    7: [("right", "below", "nw")],
    # Two pixels that touch by a corner: one outline around each. The corner that ends an edge from
    # the left comes first.
    9: [("left", "above", "nw"), ("right", "below", "se")],
    6: [("left", "below", "sw"), ("right", "above", "ne")],
}


def _corners(around: npt.NDArray[np.int8]) -> _Corners:
    places: list[_Ints] = []
    sides: list[npt.NDArray[np.bool_]] = []
    flat = around.ravel()
    for code, turns in _TURNS.items():
        found = np.flatnonzero(flat == code)
        for level, upright, pixel in turns:
            places.append(found)
            side = ("w" in pixel, "n" in pixel, level == "left", upright == "above")
            sides.append(np.broadcast_to(np.array(side), (len(found), 4)))
    place, side = np.concatenate(places), np.concatenate(sides)
    # By rows; of two at one point the one with the edge to the left first.
    order = np.lexsort((~side[:, 2], place))
    y, x = np.divmod(place[order], around.shape[1])
    return _Corners(x, y, *side[order].T)


def _following(corners: _Corners) -> _Ints:
    """Return for every corner the next of its outline, level and upright edges in turn.

    A level edge joins a corner of which it goes right to the next in its row, so corners in rows
    are pairs; in columns likewise.
    """
    count = len(corners.x)
    level = np.arange(count) ^ 1
    by_column = np.lexsort((~corners.edge_is_above, corners.y, corners.x))
    upright = np.empty(count, dtype=np.int64)
    upright[by_column] = by_column[np.arange(count) ^ 1]
    # A ring is walked along the level edge from every other corner: so that the mask is on one
    # hand, whichever way a corner turns.
    clockwise = corners.edge_is_left == corners.mask_is_above
    return np.where(clockwise, level, upright)


def _cycles(following: list[int]) -> list[list[int]]:
    rings: list[list[int]] = []
    seen = bytearray(len(following))
    for start in range(len(following)):
        if seen[start]:
            continue
        ring: list[int] = []
        at = start
        while not seen[at]:
            seen[at] = 1
            ring.append(at)
            at = following[at]
        rings.append(ring)
    return rings


def _area(ring: npt.NDArray[np.float64]) -> float:
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))
