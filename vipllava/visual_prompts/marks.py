"""Marks that a person puts on an image: a place and a look, the same by page, terminal and code.

Training samples marks from regions (:mod:`vipllava.visual_prompts.sampling`); a person says which.
What is left open has one default, so the same marks give the same plan, and so the same pixels,
wherever they come from:

shape            what is drawn where only the place is given
rectangle        the box, or the bounds of the mask
ellipse          around the bounds of the region, 1 to 1.5 times as large (drawn from ``seed``)
point            at the point; for a box or mask, drawn from ``seed`` near its middle
triangle         the three points of ``stroke``, else corners drawn from ``seed`` in the region
mask             the mask, filled; without one, the box
mask contour     the outline of the mask; without one, of the box
arrow            from the first point of ``stroke`` to its last, where the tip is; at a point from
                 anywhere (``seed``); else drawn from ``seed``, its tip near the region's middle
                 and, of a mask in run lengths, on it
scribble         the polyline of ``stroke``; else a curve drawn from ``seed`` in the region

Point, triangle and scribble lie in the largest piece of a region that has several. ``seed`` belongs
to a mark, not to the image: another mark more or less moves nothing. A mark without a colour has
the first of the palette that no other mark of its shape has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, starmap
from types import MappingProxyType
from typing import Any, ClassVar, Final

import numpy as np

from vipllava import types
from vipllava.keyed_random import generator_for
from vipllava.types import (
    RGB,
    BBox,
    FixedVisualPrompt,
    Polygon,
    RecordError,
    Region,
    Shape,
    Stroke,
    VisualPrompt,
    VisualPromptPlan,
)
from vipllava.visual_prompts.geometry import bounds_of
from vipllava.visual_prompts.mark_places import (
    PLACE_CHECKS,
    Described,
    MarkError,
    check_colour,
    clip_box,
    clip_ring,
    clip_stroke,
    inside,
    is_inside,
    is_whole,
)
from vipllava.visual_prompts.mask_pixels import MaskPixels
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.rle import check_rle
from vipllava.visual_prompts.sampling import arrow_head, sample_plan
from vipllava.visual_prompts.shapes import PALETTE, prompt_words

MOST_MARKS: Final = 100
"""Marks on one image; a hundred hide what they point at."""
MOST_DRAWN: Final = 400_000
"""Points that the strokes of all marks on one image have together."""
_RING_POINTS: Final = 2_000
"""Of an outline, where points in it are drawn from chance: every how-manieth is left of more."""
_WIDTH: Final = 3
"""Of lines: pixels of an image whose longer side is the policy's anchor."""
_LEAST_WIDTH: Final = 3
"""Pixels of the stored image: what a person still sees."""
_WIDTHS: Final[dict[str, tuple[int, int]]] = {"point": (8, 5), "mask contour": (1, 1)}
"""Shapes whose width is no line's: the same, and the least."""
_HEAD: Final = 0.35
"""Of an arrow's length, at most of the longest that training draws; the middle of its range."""
_ALPHA: Final = 128  # as marks are evaluated; training has 96..255, for masks 48..128
_ATTEMPTS: Final = 16  # at a tail inside of the image
_LOOK: Final = VisualPromptPolicy(constant_style=True)
_MENTION: Final = re.compile(r"\{\{([0-9]{1,6})\}\}|\{([0-9]{1,6})\}")
_PLACES: Final = ("box", "polygon", "rle", "point", "stroke")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One mark; of ``box``, ``polygon``, ``rle``, ``point`` and ``stroke`` exactly one is given.

    Places are in pixels of the image as a person sees it (upright). What reaches out of the image
    is cut off. Use the eight shapes, e.g. :class:`Rectangle`.

    Raises:
        MarkError: a field means nothing, or the shape has no use for the place.
    """

    shape: ClassVar[Shape]
    places: ClassVar[tuple[str, ...]] = ("box", "polygon", "rle")

    box: BBox | None = None  # x1, y1, x2, y2
    # rings of points; one ring may be given as such
    polygon: tuple[Polygon, ...] | None = None
    # COCO's {"size": [height, width], "counts": letters or list}, or an array bool [height, width]
    rle: Any = None
    point: types.Point | None = None  # x, y
    stroke: Polygon | None = None  # exactly these points: drawn by hand
    colour: str | RGB | None = None  # a palette name, which texts say, or red, green, blue
    # pixels of the image: of lines; a point's radius; of contours, to each side of the outline
    width: int | None = None
    alpha: int | None = None  # opacity, 1..255
    seed: int = 0  # of what is drawn from chance: strokes in a box, see the module

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn; whether it lies in the image is known later."""
        given = [name for name in _PLACES if getattr(self, name) is not None]
        if len(given) != 1:
            raise MarkError(
                ", ".join(given) or "box", [getattr(self, name) for name in given] or None,
                f"exactly one of {', '.join(self.places)} for a {self.shape}",
            )  # fmt: skip
        (name,) = given
        if name not in self.places:
            raise MarkError(
                name, getattr(self, name), f"one of {', '.join(self.places)} for a {self.shape}"
            )
        check = check_rle if name == "rle" else PLACE_CHECKS[name]
        object.__setattr__(self, name, check(getattr(self, name), name))
        object.__setattr__(self, "colour", check_colour(self.colour))
        for name, least, most in (("width", 1, 10_000), ("alpha", 1, 255), ("seed", 0, 2**63 - 1)):
            value: Any = getattr(self, name)
            if value is None and name != "seed":
                continue
            if not is_whole(value) or not least <= value <= most:
                raise MarkError(name, value, f"a whole number from {least} to {most}")
            object.__setattr__(self, name, int(value))

    def region(self, size: tuple[int, int]) -> Region:
        """Return the place as a region of an image, clipped to it.

        Args:
            size: width and height of the upright image, pixels.

        Raises:
            MarkError: it lies outside, is empty, or is a mask of another image's size.
        """
        if self.box is not None:
            return Region(clip_box(self.box, size))
        if self.point is not None:
            if not is_inside(self.point, size):
                raise MarkError("point", self.point, inside("a point", size))
            return Region((*self.point, *self.point))
        if self.stroke is not None:
            x1, y1, x2, y2 = bounds_of((clip_stroke(self.stroke, size),))
            return Region((max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])))
        if self.rle is not None:
            return Region(MaskPixels.in_image(self.rle, size, "rle").bounds, rle=self.rle)
        rings = tuple(clip_ring(ring, size) for ring in self.polygon or ())
        return Region(bounds_of(rings), rings)

    def prompt(self, size: tuple[int, int], colour: str | RGB) -> VisualPrompt:
        """Return what is drawn for this mark alone.

        Args:
            size: width and height of the upright image, pixels.
            colour: what it has where it names none.

        Raises:
            MarkError: see :meth:`region`.
        """
        colour = colour if self.colour is None else self.colour
        alpha = self.alpha or _ALPHA
        if (strokes := self._given_strokes(size)) is not None:
            is_named = isinstance(colour, str)
            rgb, name = (PALETTE[colour], colour) if is_named else (colour, None)
            return VisualPrompt(0, self.shape, rgb, name, alpha, strokes)
        region = self._to_draw_in(self.region(size))
        look = FixedVisualPrompt(self.shape, colour, self._line_width(size), alpha)
        place = (region.bbox_xyxy, region.polygons if region.rle is None else region.rle)
        rng = generator_for(self.seed, "mark", self.shape, repr(place))
        (prompt,) = sample_plan([region], size, _LOOK, rng, [look]).prompts
        return prompt

    def _to_draw_in(self, region: Region) -> Region:
        """Return what of a region this shape is drawn in."""
        return region

    def _given_strokes(self, size: tuple[int, int]) -> tuple[Stroke, ...] | None:
        """Return what is given stroke by stroke, so that nothing is left to chance."""
        if self.stroke is None:
            return None
        return self._by_hand(clip_stroke(self.stroke, size), size)

    def _line_width(self, size: tuple[int, int]) -> int:
        """Return the width in pixels: the given one, else the shape's, never a hair's."""
        if self.width is not None:
            return self.width
        base, least = _WIDTHS.get(self.shape, (_WIDTH, _LEAST_WIDTH))
        return max(least, round(base * _scale(size)))

    def _by_hand(self, points: Polygon, size: tuple[int, int]) -> tuple[Stroke, ...]:
        """Return the strokes through points; for shapes that have ``stroke`` among their places."""
        raise NotImplementedError(self.shape)


_BOXES: Final = ("box", "polygon", "rle")


class _Inside(Mark):
    """A shape that lies in a region: of several rings in the largest."""

    def _to_draw_in(self, region: Region) -> Region:
        if not region.polygons:
            return region
        ring = max(region.polygons, key=_area)
        return replace(region, polygons=(ring[:: -(-len(ring) // _RING_POINTS)],))


@dataclass(frozen=True)
class Rectangle(Mark):
    """The outline of a box, or of the bounds of a mask."""

    shape: ClassVar[Shape] = "rectangle"
    box: BBox | None = field(default=None, kw_only=False)


@dataclass(frozen=True)
class Ellipse(Mark):
    """An ellipse around a region."""

    shape: ClassVar[Shape] = "ellipse"
    box: BBox | None = field(default=None, kw_only=False)


@dataclass(frozen=True)
class Point(_Inside):
    """A filled disc; ``width`` is its radius."""

    shape: ClassVar[Shape] = "point"
    places: ClassVar[tuple[str, ...]] = ("point", *_BOXES)
    point: types.Point | None = field(default=None, kw_only=False)


@dataclass(frozen=True)
class Triangle(_Inside):
    """The outline of a triangle."""

    shape: ClassVar[Shape] = "triangle"
    places: ClassVar[tuple[str, ...]] = (*_BOXES, "stroke")
    box: BBox | None = field(default=None, kw_only=False)

    def _by_hand(self, points: Polygon, size: tuple[int, int]) -> tuple[Stroke, ...]:
        if len(points) != 3:
            raise MarkError("stroke", self.stroke, f"three corners, not {len(points)} points")
        return (Stroke("polygon", points, self._line_width(size)),)


@dataclass(frozen=True)
class Mask(Mark):
    """A region, filled."""

    shape: ClassVar[Shape] = "mask"
    box: BBox | None = field(default=None, kw_only=False)


@dataclass(frozen=True)
class MaskContour(Mark):
    """The outline of a region; ``width`` is what the brush reaches to each side of it."""

    shape: ClassVar[Shape] = "mask contour"
    box: BBox | None = field(default=None, kw_only=False)


@dataclass(frozen=True)
class Arrow(Mark):
    """An arrow whose tip is in the region, or is the last point of ``stroke``."""

    shape: ClassVar[Shape] = "arrow"
    places: ClassVar[tuple[str, ...]] = (*_BOXES, "point", "stroke")
    box: BBox | None = field(default=None, kw_only=False)

    def _given_strokes(self, size: tuple[int, int]) -> tuple[Stroke, ...] | None:
        if self.point is None:
            return super()._given_strokes(size)
        (x, y, *_), far = self.region(size).bbox_xyxy, _LOOK.ranges.arrow_length[1] * _scale(size)
        rng = generator_for(self.seed, "arrow", repr(self.point))
        tail = (x, y)
        for angle in rng.uniform(0, 2 * math.pi, size=_ATTEMPTS).tolist():
            tail = (x + far * math.cos(angle), y + far * math.sin(angle))
            if is_inside(tail, size):
                break
        return self._by_hand((tail, (x, y)), size)

    def _by_hand(self, points: Polygon, size: tuple[int, int]) -> tuple[Stroke, ...]:
        tip, ranges, scale = points[-1], _LOOK.ranges, _scale(size)
        away = max(points, key=lambda point: math.dist(point, tip))
        if away == tip or not is_inside(tip, size):
            expected = inside("points from an arrow's tail to its tip, which is", size)
            raise MarkError("stroke", self.stroke, expected)
        length = min(sum(starmap(math.dist, pairwise(points))), ranges.arrow_length[1] * scale)
        head = max(_HEAD * length, int(ranges.arrow_head_min * scale))
        # The last points of a hand are too close to say where it came from.
        near = (point for point in reversed(points) if math.dist(point, tip) >= head)
        x, y = next(near, away)
        distance = math.dist((x, y), tip)
        back = ((x - tip[0]) / distance, (y - tip[1]) / distance)
        width = self._line_width(size)
        return Stroke("line", points, width), arrow_head(tip, back, head, width, filled=False)


@dataclass(frozen=True)
class Scribble(_Inside):
    """A line drawn by hand, or a curve from chance in the region."""

    shape: ClassVar[Shape] = "scribble"
    places: ClassVar[tuple[str, ...]] = (*_BOXES, "stroke")
    box: BBox | None = field(default=None, kw_only=False)

    def _by_hand(self, points: Polygon, size: tuple[int, int]) -> tuple[Stroke, ...]:
        return (Stroke("line", points, self._line_width(size)),)


MARKS: Final[Mapping[Shape, type[Mark]]] = MappingProxyType(
    {
        kind.shape: kind
        for kind in (Rectangle, Ellipse, Point, Triangle, Mask, MaskContour, Arrow, Scribble)
    }
)
"""The class of each shape."""


def plan_marks(marks: Sequence[Mark], size: tuple[int, int]) -> VisualPromptPlan:
    """Return what is drawn for marks, in their order; the same marks give the same plan.

    A mark without a colour gets the first of the palette that no other mark of its shape has, so
    that words tell them apart.

    Args:
        marks: at most ``MOST_MARKS``.
        size: width and height of the upright image, pixels.

    Raises:
        MarkError: a mark lies outside, is empty, or there are too many; its field begins with the
            mark's number, e.g. ``regions[2].box``.
    """
    if len(marks) > MOST_MARKS:
        raise MarkError("regions", len(marks), f"at most {MOST_MARKS} marks on one image")
    prompts: list[VisualPrompt] = []
    num_points = 0
    for index, (mark, colour) in enumerate(zip(marks, _colours(marks), strict=True)):
        try:
            prompt = mark.prompt(size, colour)
        except MarkError as error:
            raise error.at(f"regions[{index}]") from error
        num_points += sum(len(stroke.points) for stroke in prompt.strokes)
        if num_points > MOST_DRAWN:
            found = Described(f"{num_points} points, with the marks before it")
            raise MarkError(f"regions[{index}]", found, f"at most {MOST_DRAWN} on one image")
        prompts.append(replace(prompt, region=index))
    return VisualPromptPlan(size, tuple(prompts))


def refer_text(text: str, plan: VisualPromptPlan) -> str:
    """Replace every ``{N}`` of a text by the words of mark N, e.g. ``within the red rectangle``.

    ``{{N}}`` becomes ``{N}``.

    Raises:
        RecordError: a mention of a mark that is not there, or of one of two that the same words
            name.
    """
    words = [prompt_words(prompt) for prompt in plan.prompts]
    uses = Counter(words)

    def said(match: re.Match[str]) -> str:
        if match[1] is not None:
            return f"{{{match[1]}}}"
        number = int(match[2])
        if number >= len(words):
            raise RecordError(
                f"the text mentions {match[0]}, and {_which_there_are(len(words))}, or write "
                f"{{{match[0]}}} for these letters themselves",
                "placeholder-without-region",
            )
        if uses[words[number]] > 1:
            others = [index for index, each in enumerate(words) if each == words[number]]
            raise RecordError(
                f"the text mentions {match[0]}, but the words `{words[number]}` name marks "
                f"{others}; give one of them another colour of the palette, or another shape",
                "same-words",
            )
        return words[number]

    return _MENTION.sub(said, text)


def _which_there_are(num_marks: int) -> str:
    if num_marks == 0:
        return "nothing is marked: give its region"
    if num_marks == 1:
        return "the only mark is {0}: say that one"
    return f"the marks are {{0}} to {{{num_marks - 1}}}: say one of them"


def coloured(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Return marks with the colours that they have together, so that each keeps its own."""
    pairs = zip(marks, _colours(marks), strict=True)
    return tuple(m if m.colour is not None else replace(m, colour=c) for m, c in pairs)


def _next_colour(taken: Collection[str | RGB | None]) -> str:
    return next((name for name in PALETTE if name not in taken), next(iter(PALETTE)))


def _colours(marks: Sequence[Mark]) -> list[str | RGB]:
    taken: dict[Shape, set[str | RGB | None]] = {mark.shape: set() for mark in marks}
    for mark in marks:
        taken[mark.shape].add(mark.colour)
    colours: list[str | RGB] = []
    for mark in marks:
        colours.append(_next_colour(taken[mark.shape]) if mark.colour is None else mark.colour)
        taken[mark.shape].add(colours[-1])
    return colours


def _area(ring: Polygon) -> float:
    x, y = np.array(ring).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _scale(size: tuple[int, int]) -> float:
    return max(size) / _LOOK.ranges.anchor
