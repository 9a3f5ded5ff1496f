"""Where a mark may be: the numbers of a place checked, and clipped to an image."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Final, SupportsFloat, TypeGuard, cast

import numpy as np

from vipllava.types import RGB, BBox, Point, Polygon, VipLlavaError
from vipllava.visual_prompts.shapes import PALETTE

MOST_POINTS: Final = 20_000
"""Points of one polygon or stroke, all rings together."""
_FARTHEST: Final = 1e7
"""Of a coordinate, pixels: far beyond any image."""
_SHOWN: Final = 80
_HEX: Final = re.compile(r"#[0-9a-fA-F]{6}")
_REPR: Final = reprlib.Repr()  # bounded: values may nest without end, or hold megabytes
_REPR.maxstring = _REPR.maxother = _SHOWN


class Described(str):
    """Stands for a value in a message: what it is, not what it holds."""

    def __repr__(self) -> str:
        return str(self)


class MarkError(VipLlavaError):
    """A mark cannot be drawn or named; ``field`` says what of it is wrong, e.g. ``box``."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        try:
            shown = value if isinstance(value, Described) else _REPR.repr(value)
        except ValueError:  # Python writes no number of more than 4300 digits
            shown = "a number of thousands of digits"
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        super().__init__(f"{field} is {shown}; expected {expected}")
        self.field, self.value, self.expected = field, value, expected

    def at(self, where: object) -> MarkError:
        """Return the same error with its field inside ``where``, e.g. ``regions[2].box``."""
        return MarkError(f"{where}.{self.field}", self.value, self.expected)


def check_colour(value: object) -> str | RGB | None:
    """Return a colour of the palette or three channels of 0..255; None stays None."""
    if value is None:
        return None
    expected = f"one of {', '.join(PALETTE)}, or [r, g, b] of 0..255, or #rrggbb"
    if isinstance(value, str):
        if value in PALETTE:
            return value
        if not _HEX.fullmatch(value):
            raise MarkError("colour", value, expected)
        value = list(bytes.fromhex(value[1:]))
    channels = _items(value)
    if channels is None or len(channels) != 3 or not all(map(_is_channel, channels)):
        raise MarkError("colour", value, expected)
    red, green, blue = map(int, channels)
    return red, green, blue


def _is_channel(value: object) -> bool:
    return is_whole(value) and 0 <= value <= 255


def is_whole(value: Any) -> TypeGuard[int]:
    """Tell whether a value is a whole number, Python's or numpy's, and no truth value."""
    return isinstance(value, Integral) and value is not True and value is not False


def _items(value: Any) -> list[Any] | None:
    """Return what a list, tuple, array or tensor holds; None for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else None


def _numbers(value: object, name: str, count: int, expected: str) -> tuple[float, ...]:
    found = _items(value)
    if found is None or len(found) != count or not all(map(_is_coordinate, found)):
        raise MarkError(name, value, expected)
    return tuple(float(each) for each in found)


def _is_coordinate(value: object) -> bool:
    """Tell whether a value is a finite number; one of numpy's, e.g., has no truth value."""
    is_plain = type(value) is float or type(value) is int  # quick, as there are thousands
    if not is_plain and (
        isinstance(value, (bool, np.bool_)) or not isinstance(value, SupportsFloat)
    ):
        return False
    try:
        return abs(float(cast("SupportsFloat", value))) <= _FARTHEST
    except (OverflowError, ValueError, TypeError):
        return False


def _check_box(value: object, name: str) -> BBox:
    expected = "four finite numbers x1, y1, x2, y2 in pixels, x1 < x2 and y1 < y2"
    x1, y1, x2, y2 = _numbers(value, name, 4, expected)
    if x1 >= x2 or y1 >= y2:
        raise MarkError(name, value, expected)
    return x1, y1, x2, y2


def _check_point(value: object, name: str) -> Point:
    x, y = _numbers(value, name, 2, "two finite numbers x, y in pixels")
    return x, y


def _check_ring(value: object, name: str, least: int) -> Polygon:
    expected = f"{least} to {MOST_POINTS} points [x, y] of finite numbers in pixels"
    points = _items(value)
    if points is None:
        raise MarkError(name, value, expected)
    if not least <= len(points) <= MOST_POINTS:
        raise MarkError(name, Described(f"a list of {len(points)}"), expected)
    numbers = (_numbers(point, name, 2, expected) for point in points)
    return tuple((x, y) for x, y in numbers)


def _check_stroke(value: object, name: str) -> Polygon:
    return _check_ring(value, name, 2)


def _check_polygon(value: object, name: str) -> tuple[Polygon, ...]:
    """Take one ring, or several of them: the first point tells."""
    items = _items(value) or []
    first = _items(items[0]) if items else None
    is_ring = first is not None and len(first) == 2 and all(map(_is_coordinate, first))
    rings = [value] if is_ring or first is None else items
    checked = tuple(_check_ring(ring, name, 3) for ring in rings)
    if sum(map(len, checked)) > MOST_POINTS:
        found = Described(f"a list of {sum(map(len, checked))} points")
        raise MarkError(name, found, f"at most {MOST_POINTS}")
    return checked


PLACE_CHECKS: Final[Mapping[str, Callable[[object, str], object]]] = {
    "box": _check_box,
    "point": _check_point,
    "polygon": _check_polygon,
    "stroke": _check_stroke,
}
"""By the name of a place what checks its value (and names it in the error)."""


def inside(what: str, size: tuple[int, int]) -> str:
    """Say what is expected of a place in an image of ``size`` (width, height)."""
    return f"{what} inside the image of {size[0]} x {size[1]} pixels"


def clip_box(box: BBox, size: tuple[int, int]) -> BBox:
    """Cut off what reaches out of an image of ``size``; MarkError if nothing is left."""
    x1, y1, x2, y2 = box
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1])))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise MarkError("box", box, inside("a box with a part", size))
    return clipped


def is_inside(point: Point, size: tuple[int, int]) -> bool:
    """Tell whether a point lies on a pixel of an image of ``size``."""
    return 0 <= point[0] < size[0] and 0 <= point[1] < size[1]


def clip_stroke(stroke: Polygon, size: tuple[int, int]) -> Polygon:
    """Return a stroke as it is: drawing cuts it off, and a line with a moved end is another one.

    What is further away than the image is large is moved nearer, so that nobody draws for hours.

    Raises:
        MarkError: none of its points is inside.
    """
    if not any(is_inside(point, size) for point in stroke):
        raise MarkError("stroke", stroke, inside("a point at least", size))
    (width, height) = map(float, size)
    return tuple(
        (min(max(x, -width), 2 * width), min(max(y, -height), 2 * height)) for x, y in stroke
    )


def clip_ring(ring: Polygon, size: tuple[int, int]) -> Polygon:
    """Move points outside of an image to its edge; MarkError if all are."""
    right, bottom = map(float, size)
    xs, ys = zip(*ring, strict=True)
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= right or min(ys) >= bottom:
        raise MarkError("polygon", ring, inside("rings with a part", size))
    return tuple((min(max(x, 0.0), right), min(max(y, 0.0), bottom)) for x, y in ring)
