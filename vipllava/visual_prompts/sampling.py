"""Regions to a plan of marks: every random choice about pixels and words is made here, once.

Each region first gets a *style* (shape, colour, opacity, width), because colours depend on how
often a shape occurs in the image; then each style is turned into strokes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vipllava.types import (
    RGB,
    BBox,
    FixedVisualPrompt,
    Point,
    Polygon,
    RecordError,
    Region,
    Shape,
    Stroke,
    VisualPrompt,
    VisualPromptPlan,
)
from vipllava.visual_prompts.geometry import (
    Mask,
    bounds_of,
    bounds_of_mask,
    cubic_bezier,
    largest_angle,
    one_of,
    sample_central_point,
    sample_points,
)
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.mask_pixels import MaskPixels, mask_fault
from vipllava.visual_prompts.policies import FloatRange, IntRange, VisualPromptPolicy
from vipllava.visual_prompts.shapes import PALETTE, SHAPES, check_shape, named_colour, shape_words

_ATTEMPTS = 16
_LARGEST_TRIANGLE_ANGLE = 150.0
_LEAST_SPAN = 4.0
"""Least longer side of a triangle or scribble and least length of an arrow, pixels at the anchor
and of the stored picture; what the released code draws smaller is a speck or points nowhere."""
_SCRIBBLE_STEPS = 1000
"""Of a scribble's curve, in a picture of the anchor's size: so many that every pixel is met."""
_ARROW_BARB_ANGLE = math.radians(60)
_INSIDE: Final[frozenset[Shape]] = frozenset(("point", "triangle", "scribble", "arrow"))
"""Shapes that are drawn in the largest piece of a mask in run lengths."""


@dataclass(frozen=True, slots=True)
class _Style:
    """What two regions of one phrase share; ``width`` is a point's radius for points."""

    shape: Shape
    rgb: RGB
    colour_name: str | None
    alpha: int
    width: int
    aspect: float


def sample_plan(
    regions: Sequence[Region],
    size: tuple[int, int],
    policy: VisualPromptPolicy,
    rng: np.random.Generator,
    fixed: Sequence[FixedVisualPrompt] = (),
) -> VisualPromptPlan:
    """Sample one mark per region, in the regions' order.

    Args:
        regions: boxes and masks in pixels of the stored image.
        size: width and height of the stored image, pixels.
        policy: shapes, ranges and colour rules.
        rng: the only source of randomness; see :func:`vipllava.keyed_random.generator_for`.
        fixed: what the user fixed, one per region, or empty.

    Raises:
        RecordError: regions cannot be told apart by words although the policy demands it, be it
            that the palette is exhausted or that two are fixed to the same words; or a mask in run
            lengths is empty, or of another size.
        VipLlavaError: a fixed shape or colour is unknown.
    """
    fixed = fixed or (FixedVisualPrompt(),) * len(regions)
    if len(fixed) != len(regions):
        raise RecordError(
            f"{len(fixed)} fixed visual prompts for {len(regions)} regions; give one per region"
        )
    sampler = _Sampler(policy, size, rng, fixed)
    styles = sampler.styles(regions)
    if policy.distinguishable:
        _check_words(regions, styles)
    prompts = tuple(
        VisualPrompt(
            region=index,
            shape=style.shape,
            rgb=style.rgb,
            colour_name=style.colour_name,
            alpha=style.alpha,
            strokes=sampler.strokes(region, style),
        )
        for index, (region, style) in enumerate(zip(regions, styles, strict=True))
    )
    return VisualPromptPlan(size, prompts, policy.article_rate)


@dataclass(frozen=True, slots=True)
class _Sampler:
    """The random choices about one sample; every method draws from the same generator."""

    policy: VisualPromptPolicy
    size: tuple[int, int]
    rng: np.random.Generator
    fixed: Sequence[FixedVisualPrompt]

    @property
    def scale(self) -> float:
        return max(self.size) / self.policy.ranges.anchor

    def styles(self, regions: Sequence[Region]) -> list[_Style]:
        own = [index for index, region in enumerate(regions) if region.style_of is None]
        shapes = self.shapes(own)
        colours = self.colours(shapes)
        styles: dict[int, _Style] = {}
        ranges = self.policy.ranges
        for index, shape in shapes.items():
            choice = self.fixed[index]
            alpha = choice.alpha or self.policy.fixed_alpha
            if alpha is None:
                alpha = self.integer(ranges.mask_alpha if shape == "mask" else ranges.alpha)
            round_point = self.policy.constant_style or self.rng.random() < 0.5
            aspect = 1.0 if round_point else self.number(ranges.point_aspect)
            width = choice.width or self.width(shape)
            styles[index] = _Style(shape, *colours[index], alpha, width, aspect)
        for index, region in enumerate(regions):
            if region.style_of is not None:
                if region.style_of not in styles or region.style_of >= index:
                    raise RecordError(
                        f"region {index} repeats the style of region {region.style_of}; "
                        "name an earlier region"
                    )
                styles[index] = styles[region.style_of]
        return [styles[index] for index in range(len(regions))]

    def shapes(self, own: Sequence[int]) -> dict[int, Shape]:
        """Choose a shape per style; a distinguishable policy gives none more marks than names."""
        policy, fixed = self.policy, self.fixed
        names = len(PALETTE) if policy.name_colour and policy.colour is None else 1
        said: dict[Shape, set[str]] = {shape: set() for shape in SHAPES}
        undecided: Counter[Shape] = Counter()

        def is_free(shape: Shape, colour_name: str | None) -> bool:
            if colour_name == "":
                return "" not in said[shape]
            room = len(PALETTE) - len(said[shape] - {""}) - undecided[shape]
            return room > 0 and colour_name not in said[shape]

        # What is fixed comes first, so that nothing sampled takes its words.
        spoken = {index: _spoken_colour(fixed[index], policy) for index in own}
        order = sorted(own, key=lambda i: (fixed[i].shape is None, spoken[i] is None))
        shapes: dict[int, Shape] = {}
        for index in order:
            colour_name = spoken[index]
            if (fixed_shape := fixed[index].shape) is not None:
                shape: Shape = check_shape(fixed_shape)
            else:
                free: list[Shape] = [
                    s
                    for s in policy.shapes
                    if not policy.distinguishable or is_free(s, colour_name)
                ]
                if not free:
                    raise RecordError(
                        f"{len(own)} regions cannot be told apart by words: {len(policy.shapes)} "
                        f"shapes with {names} colour names each; use more shapes or fewer regions",
                        "same-words",
                    )
                shape = free[int(self.rng.integers(len(free)))]
            shapes[index] = shape
            if colour_name is None:
                undecided[shape] += 1
            else:
                said[shape].add(colour_name)
        return {index: shapes[index] for index in own}

    def colours(self, shapes: dict[int, Shape]) -> dict[int, tuple[RGB, str | None]]:
        """Choose colour and spoken name per style.

        A shape used more than once gets distinct names while they last; a shape used once gets a
        name at ``named_colour_rate``. Fixed colours are set first, so that nobody else takes them.
        """
        fixed = self.fixed
        colours: dict[int, tuple[RGB, str | None]] = {}
        taken: dict[Shape, set[str]] = {shape: set() for shape in shapes.values()}
        for index, shape in shapes.items():
            colour = fixed[index].colour if fixed[index].colour is not None else self.policy.colour
            if isinstance(colour, str):
                rgb = named_colour(colour)
                colours[index] = (rgb, colour if self.policy.name_colour else None)
                taken[shape].add(colour)
            elif colour is not None:
                colours[index] = (colour, None)
        uses = Counter(shapes.values())
        for index, shape in shapes.items():
            if index in colours:
                continue
            free = [name for name in PALETTE if name not in taken[shape]]
            wants_name = uses[shape] > 1 or self.rng.random() < self.policy.named_colour_rate
            if self.policy.name_colour and wants_name and free:
                name = free[int(self.rng.integers(len(free)))]
                taken[shape].add(name)
                colours[index] = (PALETTE[name], name)
            else:
                red, green, blue = self.rng.integers(0, 256, size=3)
                colours[index] = ((int(red), int(green), int(blue)), None)
        return colours

    def width(self, shape: Shape) -> int:
        ranges, scale = self.policy.ranges, self.scale
        if shape == "rectangle" and self.policy.constant_style:
            return max(1, int(ranges.constant_rectangle_width * scale))
        if shape == "point" and self.policy.constant_style:
            return max(1, int(ranges.constant_point_radius * scale))
        widths: dict[Shape, IntRange] = {
            "rectangle": ranges.rectangle_width,
            "ellipse": ranges.ellipse_width,
            "triangle": ranges.triangle_width,
            "scribble": ranges.scribble_width,
            "arrow": ranges.arrow_width,
            "point": ranges.point_radius,
            "mask contour": ranges.contour_width,
            "mask": (0, 0),
        }
        low, high = widths[shape]
        return max(1, self.integer((int(low * scale), int(high * scale))))

    def strokes(self, region: Region, style: _Style) -> tuple[Stroke, ...]:
        bbox, mask, width = region.bbox_xyxy, self.mask(region, style.shape), style.width
        match style.shape:
            case "rectangle":
                return (Stroke("box", (bbox[:2], bbox[2:]), width),)
            case "ellipse":
                scale = self.number(self.policy.ranges.ellipse_scale)
                bounds = _enlarge(bounds_of_mask(mask, bbox), scale, self.size)
                return (Stroke("ellipse", (bounds[:2], bounds[2:]), width),)
            case "triangle":
                return (Stroke("polygon", self.triangle(mask, bbox), width),)
            case "point":
                x, y = sample_central_point(
                    mask, bbox, self.rng, released=self.policy.released_point_jitter
                )
                rx, ry = width * style.aspect, width / style.aspect
                return (Stroke("ellipse", ((x - rx, y - ry), (x + rx, y + ry))),)
            case "scribble":
                return (Stroke("line", self.scribble(mask, bbox), width),)
            case "mask" if isinstance(mask, MaskPixels):  # filled rings would close holes
                return tuple(Stroke("box", (box[:2], box[2:])) for box in mask.boxes())
            case "mask":
                return tuple(Stroke("polygon", ring) for ring in _outlines(mask, bbox))
            case "mask contour":
                brush = 2 * width + 1
                return tuple(Stroke("contour", ring, brush) for ring in _outlines(mask, bbox))
            case "arrow":
                return self.arrow(mask, bbox, width)

    def mask(self, region: Region, shape: Shape) -> Mask:
        """Return what of a region's mask a shape is drawn in."""
        if region.rle is None:
            return region.polygons
        try:
            pixels = MaskPixels.in_image(region.rle, self.size, "rle")
        except MarkError as error:
            raise RecordError(f"region {region.bbox_xyxy}: {error}", mask_fault(error)) from error
        # Masks from models have specks; what lies inside lies where the object is.
        return pixels.largest_piece() if shape in _INSIDE else pixels

    def triangle(self, mask: Mask, bbox: BBox) -> tuple[Point, ...]:
        for _ in range(_ATTEMPTS):
            corners = sample_points(mask, bbox, 3, self.rng)
            if largest_angle(corners) <= _LARGEST_TRIANGLE_ANGLE and self.is_seen(corners):
                return tuple(corners)
        # Regions too thin or small for such a triangle: the one that fills their bounds.
        x1, y1, x2, y2 = bounds_of_mask(mask, bbox)
        return ((x1 + x2) / 2, y1), (x2, y2), (x1, y2)

    def scribble(self, mask: Mask, bbox: BBox) -> tuple[Point, ...]:
        count = int(_SCRIBBLE_STEPS * self.scale)
        for _ in range(_ATTEMPTS):
            curve = cubic_bezier(sample_points(one_of(mask, self.rng), bbox, 4, self.rng), count)
            if self.is_seen(curve):
                return curve
        # Regions too small for a curve of any size: one through all of their bounds.
        x1, y1, x2, y2 = bounds_of_mask(mask, bbox)
        return cubic_bezier(((x1, y1), (x2, y1), (x1, y2), (x2, y2)), count)

    def arrow(self, mask: Mask, bbox: BBox, width: int) -> tuple[Stroke, ...]:
        """Draw shaft and head; both start at the tip, so the arrow is its length less its head.

        As published the tip lies near the middle of the box, wherever polygons are.
        """
        ranges, scale = self.policy.ranges, self.scale
        x1, y1, x2, y2 = bbox
        near = ranges.arrow_length[0] * min(x2 - x1, y2 - y1)
        far = max(1, int(ranges.arrow_length[1] * scale))
        length = self.number((min(near, far), max(near, far)))
        head = max(self.number(ranges.arrow_head) * length, int(ranges.arrow_head_min * scale))
        tip = np.array([(x1 + x2) / 2, (y1 + y2) / 2])
        tip += self.rng.uniform(-0.25, 0.25, size=2) * (x2 - x1, y2 - y1)
        if isinstance(mask, MaskPixels) and not mask.contains(tip[None])[0]:
            tip = np.array(mask.sample(1, self.rng)[0])
        angle = float(self.rng.uniform(0, 2 * math.pi))
        back = np.array([math.cos(angle), math.sin(angle)])
        tail = tip + max(self.least_span, length - head) * back
        bent, filled = self.rng.random(size=2) < 0.5
        shaft = [tip, tail]
        if bent:
            bend = self.rng.uniform(-ranges.arrow_bend, ranges.arrow_bend, size=2) * int(scale)
            shaft.insert(1, (tip + tail) / 2 + bend)
        head_stroke = arrow_head(tip, back, head, width, filled=bool(filled))
        return Stroke("line", _points(shaft), width), head_stroke

    @property
    def least_span(self) -> float:
        return _LEAST_SPAN * max(1.0, self.scale)

    def is_seen(self, points: Sequence[Point]) -> bool:
        x1, y1, x2, y2 = bounds_of((tuple(points),))
        return max(x2 - x1, y2 - y1) >= self.least_span

    def number(self, bounds: FloatRange) -> float:
        return float(self.rng.uniform(*bounds))

    def integer(self, bounds: IntRange) -> int:
        return int(self.rng.integers(bounds[0], bounds[1] + 1))


def arrow_head(
    tip: Point | np.ndarray,
    back: Point | np.ndarray,
    length: float,
    width: int,
    *,
    filled: bool,
) -> Stroke:
    """Return the head of an arrow.

    Args:
        tip: where it points, pixels.
        back: from there along the shaft, of length 1.
        length: of the head's sides, pixels.
        width: of its lines, pixels.
        filled: a triangle instead of two lines.
    """
    end, along = np.array(tip), np.array(back)
    barbs = [end + length * _rotate(along, side * _ARROW_BARB_ANGLE) for side in (-1, 1)]
    corners = _points([barbs[0], end, barbs[1]])
    return Stroke("polygon", corners) if filled else Stroke("line", corners, width)


def _spoken_colour(choice: FixedVisualPrompt, policy: VisualPromptPolicy) -> str | None:
    """Return the colour that the words will say, empty for none, None where that is sampled."""
    colour = choice.colour if choice.colour is not None else policy.colour
    if not policy.name_colour or (colour is not None and not isinstance(colour, str)):
        return ""
    return colour


def _check_words(regions: Sequence[Region], styles: Sequence[_Style]) -> None:
    """Refuse two styles of the same words; "the" or no "the" tells nobody apart."""
    owners: dict[str, int] = {}
    for index, (region, style) in enumerate(zip(regions, styles, strict=True)):
        if region.style_of is not None:
            continue
        words = shape_words(style.shape, style.colour_name)
        if (other := owners.setdefault(words, index)) != index:
            raise RecordError(
                f"regions {other} and {index} would both be called `{words}`; fix another shape "
                "or colour for one of them",
                "same-words",
            )


def _outlines(mask: Mask, bbox: BBox) -> tuple[Polygon, ...]:
    """Return the rings of a mask; without one, of the box."""
    if isinstance(mask, MaskPixels):
        return mask.outlines()
    x1, y1, x2, y2 = bbox
    return mask or (((x1, y1), (x2, y1), (x2, y2), (x1, y2)),)


def _enlarge(bbox: BBox, factor: float, size: tuple[int, int]) -> BBox:
    """Enlarge the bounds of an ellipse; one out of the image on all four sides is fitted into it.

    Of an ellipse around an image, slivers in the corners are seen, or nothing at all.
    """
    x1, y1, x2, y2 = bbox
    dx, dy = (x2 - x1) * (factor - 1) / 2, (y2 - y1) * (factor - 1) / 2
    if x1 < dx and y1 < dy and x2 + dx > size[0] and y2 + dy > size[1]:
        return 0.0, 0.0, size[0] - 1.0, size[1] - 1.0
    return x1 - dx, y1 - dy, x2 + dx, y2 + dy


def _rotate(vector: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1]])


def _points(vertices: Sequence[np.ndarray]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in vertices)
