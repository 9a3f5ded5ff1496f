"""Masks as COCO's run lengths: checked, decoded, and as what paints or outlines the same pixels.

A mask is run through column by column, from the top left: so many pixels out of it, so many in it,
and so on. COCO writes the lengths as a list, or packed into letters: six bits each, of which one
says whether another one follows, from the fourth length on as the difference to the last but one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from vipllava.types import BBox, Polygon
from vipllava.visual_prompts.mark_places import Described, MarkError

Bits = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]

MOST_RUNS: Final = 100_000
"""Lengths of one mask: several times those of a hairy outline in the largest photographs."""
LONGEST_SIDE: Final = 65_535
MOST_PIXELS: Final = 100_000_000
_LETTERS: Final = 7  # of one length: 35 bits hold more than any image has pixels
_FIRST: Final = 48  # the letter of zero
_MORE: Final = 0x20
_SIGN: Final = 0x10


class RunLengths(NamedTuple):
    """A mask of an image, checked."""

    size: tuple[int, int]  # height and width of the image, pixels: in COCO's order
    counts: str  # packed


def check_rle(value: object, name: str) -> RunLengths:
    """Return run lengths in their packed form.

    Args:
        value: ``{"size": [height, width], "counts": letters or a list}`` as of COCO, or the mask
            itself, an array of truth values [height, width].
        name: of the field, for errors.

    Raises:
        MarkError: naming what of it means nothing.
    """
    if isinstance(value, RunLengths):
        return value
    if isinstance(value, np.ndarray):
        array = cast("npt.NDArray[Any]", value)
        if array.dtype != np.bool_ or array.ndim != 2 or not array.size:
            found = Described(f"an array of {array.dtype}, {list(array.shape)}")
            raise MarkError(name, found, "truth values [height, width], e.g. mask > 0")
        return RunLengths((array.shape[0], array.shape[1]), _packed(_lengths(array)))
    expected = 'an object {"size": [height, width], "counts": letters or a list}'
    if not isinstance(value, Mapping):
        raise MarkError(name, value, expected)
    fields = cast("Mapping[Any, Any]", value)
    if set(fields) != {"size", "counts"}:
        raise MarkError(name, Described(f"an object of {sorted(map(str, fields))}"), expected)
    height, width = _checked_size(fields["size"], f"{name}.size")
    lengths = _checked_lengths(fields["counts"], f"{name}.counts")
    total, area = int(lengths.sum()), height * width
    if total != area:
        raise MarkError(
            f"{name}.counts", Described(f"{len(lengths)} lengths of {total} pixels in all"),
            f"{height} x {width} = {area} pixels, as size says",
        )  # fmt: skip
    return RunLengths((height, width), _packed(lengths))


def rle_of_mask(mask: Bits) -> dict[str, Any]:
    """Return COCO's packed run lengths of a mask, bool [height, width]."""
    rle = check_rle(np.asarray(mask), "mask")
    return {"size": list(rle.size), "counts": rle.counts}


def mask_of_rle(rle: RunLengths) -> Bits:
    """Return the mask, bool [height, width]."""
    height, width = rle.size
    lengths = _unpacked(rle.counts.encode("ascii"), "counts")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def boxes_of_mask(mask: Bits) -> list[BBox]:
    """Return boxes that together cover the pixels of a mask and no others.

    Returns:
        x1, y1, x2, y2 of the first and the last pixel of each, whole numbers.
    """
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=np.int8)
    columns[:, 1:-1] = mask.T
    changes = np.diff(columns, axis=1)
    x, top = np.nonzero(changes == 1)
    _, bottom = np.nonzero(changes == -1)  # of the same runs in the same order; behind the last
    order = np.lexsort((x, bottom, top))
    x, top, bottom = x[order], top[order], bottom[order]
    goes_on = (np.diff(x) == 1) & (np.diff(top) == 0) & (np.diff(bottom) == 0)
    first = np.concatenate([[True], ~goes_on])[: len(x)]
    last = np.concatenate([~goes_on, [True]])[: len(x)]
    corners = np.stack([x[first], top[first], x[last], bottom[first] - 1], axis=1)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.astype(float).tolist()]


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


# Lengths.


def _checked_size(value: object, name: str) -> tuple[int, int]:
    expected = f"[height, width] of the image, whole numbers from 1 to {LONGEST_SIDE}"
    is_list = isinstance(value, (list, tuple))
    sides: list[Any] = list(cast("list[Any]", value)) if is_list else []
    if len(sides) != 2 or not all(type(n) is int and 1 <= n <= LONGEST_SIDE for n in sides):
        raise MarkError(name, value, expected)
    if sides[0] * sides[1] > MOST_PIXELS:
        raise MarkError(name, value, f"at most {MOST_PIXELS} pixels")
    return sides[0], sides[1]


def _checked_lengths(value: object, name: str) -> _Ints:
    if isinstance(value, str):
        try:
            value = value.encode("ascii")
        except UnicodeEncodeError:
            raise MarkError(name, value, "COCO's letters, from `0` to `o` in ASCII") from None
    if isinstance(value, bytes):
        return _unpacked(value, name)
    expected = "letters, or a list of whole numbers of 0 or more"
    if not isinstance(value, (list, tuple)):
        raise MarkError(name, value, expected)
    lengths = cast("list[Any]", value)
    _check_count(len(lengths), name)
    for number, each in enumerate(lengths):
        if type(each) is not int or not 0 <= each <= MOST_PIXELS:
            raise MarkError(f"{name}[{number}]", each, f"a whole number from 0 to {MOST_PIXELS}")
    return np.array(lengths, dtype=np.int64)


def _check_count(count: int, name: str) -> None:
    if count > MOST_RUNS:
        expected = f"at most {MOST_RUNS}: smooth the mask, or remove its specks"
        raise MarkError(name, Described(f"of {count} lengths"), expected)


def _unpacked(text: bytes, name: str) -> _Ints:
    _check_count(-(-len(text) // _LETTERS), name)  # at least, before any work
    letters = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - _FIRST
    wrong = np.flatnonzero((letters < 0) | (letters > 63))
    if len(wrong):
        at = int(wrong[0])
        raise MarkError(name, text, f"COCO's letters from `0` to `o`, not {text[at : at + 1]!r}")
    ends = np.flatnonzero((letters & _MORE) == 0)
    if len(text) != (ends[-1] + 1 if len(ends) else 0):
        raise MarkError(name, text, "a last length that ends: the text is cut off")
    _check_count(len(ends), name)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    used = ends - starts + 1
    if len(ends) and used.max() > _LETTERS:
        raise MarkError(name, text, f"at most {_LETTERS} letters a length")
    place = np.arange(len(letters)) - np.repeat(starts, used)
    parts = (letters & (_MORE - 1)) << (5 * place)
    values = np.add.reduceat(parts, starts) if len(starts) else parts
    values -= np.where(letters[ends] & _SIGN, 1 << (5 * used), 0)
    for start in (1, 2):  # differences to the last but one, from the fourth on
        values[start::2] = np.cumsum(values[start::2])
    wrong = np.flatnonzero((values < 0) | (values > MOST_PIXELS))
    if len(wrong):
        found = Described(f"a text whose length {int(wrong[0])} is {int(values[wrong[0]])}")
        raise MarkError(name, found, f"lengths from 0 to {MOST_PIXELS}")
    return values


def _packed(lengths: _Ints) -> str:
    values = lengths.copy()
    values[3:] -= lengths[1:-2]
    table = np.zeros((len(values), _LETTERS), dtype=np.uint8)
    used = np.zeros((len(values), _LETTERS), dtype=np.bool_)
    more = np.ones(len(values), dtype=np.bool_)
    for place in range(_LETTERS):
        bits = values & (_MORE - 1)
        values >>= 5
        used[:, place] = more
        more = more & (values != np.where(bits & _SIGN, -1, 0))
        table[:, place] = _FIRST + bits + np.where(more, _MORE, 0)
    return table[used].tobytes().decode("ascii")


def _lengths(mask: Bits) -> _Ints:
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = [[0, 0]] if flat[0] else [[0]]  # the first length is of pixels out of the mask
    lengths = np.diff(np.concatenate([*starts, changes, [flat.size]])).astype(np.int64)
    _check_count(len(lengths), "mask")
    return lengths
