"""How marks are sampled for one data set: shapes, ranges, colours, wording.

A job's values come from ``conf/visual_prompts``. :data:`POLICIES` has the published ones for those
who have no ``conf/``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Final, cast

from vipllava.types import Shape, VipLlavaError
from vipllava.visual_prompts.shapes import SHAPES, check_shape, named_colour

IntRange = tuple[int, int]
FloatRange = tuple[float, float]


def _is_like(value: Any, default: Any) -> bool:
    return type(value) in ((int,) if type(default) is int else (int, float))


@dataclass(frozen=True, slots=True)
class ShapeRanges:
    """Ranges of the shapes' parameters.

    Lengths are in pixels of a picture whose longer side is ``anchor``; they scale with
    ``s = max(width, height) / anchor``. Integer ranges are inclusive, fractions are of the
    quantity named.

    Attributes:
        anchor: longer side at which ``s`` is 1 (336, CLIP's input, in the published recipe).
        rectangle_width, ellipse_width, triangle_width, scribble_width, arrow_width: line widths.
        contour_width: pixels to each side of the outline; the brush is a square of twice that
            plus one.
        point_radius: radius of a round point.
        point_aspect: what the horizontal radius is multiplied and the vertical one divided by, for
            the half of points that are not round.
        ellipse_scale: enlargement of the region's bounds.
        arrow_length: (fraction of the box's shorter side, pixels at the anchor); the head is part
            of it and lies over the shaft, so that from tip to tail there is the length less the
            head.
        arrow_head: length of the head's sides as a fraction of the length.
        arrow_head_min: least length of the head's sides.
        arrow_bend: largest shift of a bent shaft's middle in x and in y, at whole multiples of the
            anchor: smaller pictures have straight shafts.
        constant_rectangle_width, constant_point_radius: values of the constant style.
        alpha: opacity of 255, all shapes but the mask.
        mask_alpha: opacity of the filled mask.
    """

    anchor: int = 336
    rectangle_width: IntRange = (2, 8)
    ellipse_width: IntRange = (2, 8)
    triangle_width: IntRange = (2, 8)
    scribble_width: IntRange = (2, 12)
    arrow_width: IntRange = (1, 6)
    contour_width: IntRange = (1, 2)
    point_radius: IntRange = (5, 20)
    point_aspect: FloatRange = (0.5, 2.0)
    ellipse_scale: FloatRange = (1.0, 1.5)
    arrow_length: FloatRange = (0.8, 50.0)
    arrow_head: FloatRange = (0.2, 0.5)
    arrow_head_min: float = 6.0
    arrow_bend: float = 5.0
    constant_rectangle_width: int = 3
    constant_point_radius: int = 8
    alpha: IntRange = (96, 255)
    mask_alpha: IntRange = (48, 128)

    def __post_init__(self) -> None:
        """Refuse what no mark can be drawn with; arguments may come from a file of a user's."""
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if not isinstance(default, tuple):
                if not _is_like(value, default):
                    raise VipLlavaError(f"ranges.{field.name} is {value!r}; give a number")
                continue
            several = isinstance(value, (tuple, list))
            bounds: list[Any] = list(cast("Sequence[Any]", value)) if several else []
            fine = len(bounds) == 2 and all(_is_like(bound, default[0]) for bound in bounds)
            # arrow_length mixes a fraction and pixels: its bounds may be reversed for big boxes.
            if not fine or (bounds[0] > bounds[1] and field.name != "arrow_length"):
                shown: object = bounds if several else cast("object", value)
                raise VipLlavaError(
                    f"ranges.{field.name} is {shown}; give [low, high] with low <= high, "
                    f"{'whole numbers' if isinstance(default[0], int) else 'numbers'}"
                )
        if self.anchor <= 0:
            raise VipLlavaError(f"ranges.anchor is {self.anchor}; it must be positive")
        for name, (low, high) in (("alpha", self.alpha), ("mask_alpha", self.mask_alpha)):
            if not 1 <= low <= high <= 255:
                raise VipLlavaError(f"ranges.{name} is [{low}, {high}]; opacity lies in 1..255")


@dataclass(frozen=True, slots=True)
class VisualPromptPolicy:
    """The sampling policy of one data set.

    Attributes:
        shapes: shapes to draw from, uniformly.
        ranges: parameter ranges.
        named_colour_rate: how often a shape that occurs once gets a named colour; shapes that
            occur several times in one picture always get distinct names.
        colour: a palette colour that every mark takes, or None to sample.
        name_colour: whether the text may say the colour.
        article_rate: how often a mention says "the".
        constant_style: fixed rectangle width and round points of fixed radius.
        released_point_jitter: points lie off the centre by the square root of an eighth of the
            region's extent, as published figures were measured with, not by an eighth of it.
        fixed_alpha: opacity for every mark (128 in evaluation), or None to sample.
        distinguishable: give no shape more marks than the palette has names, and refuse a sample
            whose regions cannot be told apart by words, instead of falling back to unnamed colours
            when the palette is exhausted.
    """

    shapes: tuple[Shape, ...] = SHAPES
    ranges: ShapeRanges = ShapeRanges()
    named_colour_rate: float = 0.5
    colour: str | None = None
    name_colour: bool = True
    article_rate: float = 1.0
    constant_style: bool = False
    released_point_jitter: bool = False
    fixed_alpha: int | None = None
    distinguishable: bool = False

    def __post_init__(self) -> None:
        """Refuse what no mark can be drawn with; arguments may come from a file of a user's."""
        shapes: Any = self.shapes
        if not isinstance(shapes, (tuple, list)):
            raise VipLlavaError(f"shapes is {shapes!r}; give a list of {', '.join(SHAPES)}")
        if not self.shapes:
            raise VipLlavaError("shapes is empty; name at least one shape")
        for shape in self.shapes:
            check_shape(shape)
        if self.colour is not None:
            named_colour(self.colour)
        for name in ("named_colour_rate", "article_rate"):
            rate = getattr(self, name)
            if type(rate) not in (int, float) or not 0 <= rate <= 1:
                raise VipLlavaError(f"{name} is {rate}; a rate lies in 0..1")
        for name in ("name_colour", "constant_style", "distinguishable"):
            if type(getattr(self, name)) is not bool:
                raise VipLlavaError(f"{name} is {getattr(self, name)}; give true or false")
        alpha = self.fixed_alpha
        if alpha is not None and (type(alpha) is not int or not 1 <= alpha <= 255):
            raise VipLlavaError(f"fixed_alpha is {alpha}; opacity lies in 1..255")


_PUBLISHED: Final = {
    "refcocog": VisualPromptPolicy(),
    "vg_rel": VisualPromptPolicy(shapes=("rectangle", "ellipse")),
    "vg_rel-gpt4v": VisualPromptPolicy(shapes=("rectangle", "ellipse"), article_rate=0.5),
    "flickr30k": VisualPromptPolicy(shapes=("rectangle", "ellipse", "arrow"), distinguishable=True),
    "vcr": VisualPromptPolicy(
        shapes=("rectangle", "ellipse", "triangle", "mask", "mask contour", "arrow", "scribble"),
        article_rate=0.5,
        distinguishable=True,
    ),
    "v7w": VisualPromptPolicy(
        shapes=("rectangle",), article_rate=0.5, constant_style=True, distinguishable=True
    ),
    "pointQA_twice": VisualPromptPolicy(
        shapes=("rectangle",), colour="red", name_colour=False, constant_style=True
    ),
    "regions": VisualPromptPolicy(distinguishable=True),  # users' own records
}

# VCR is asked with points, which training leaves out, all of one size. Colours tell nine apart;
# a tenth goes unnamed and the item is asked.
_ASKED: Final = _PUBLISHED | {
    "vcr": replace(
        _PUBLISHED["vcr"],
        shapes=("point",),
        constant_style=True,
        released_point_jitter=True,
        distinguishable=False,
    )
}

POLICIES: Final[Mapping[str, Mapping[str, VisualPromptPolicy]]] = MappingProxyType(
    {
        "published": MappingProxyType(_PUBLISHED),
        "evaluation": MappingProxyType(
            {name: replace(policy, fixed_alpha=128) for name, policy in _ASKED.items()}
        ),
    }
)
"""``published`` for training, ``evaluation`` for the benchmarks; in each by the policy's name."""


def build_policies(
    policies: Mapping[str, Mapping[str, Any]], ranges: Mapping[str, Any] | None = None
) -> dict[str, VisualPromptPolicy]:
    """Turn plain mappings (from YAML) into policies.

    Args:
        policies: per policy name the fields of :class:`VisualPromptPolicy`; ``ranges`` in one
            holds only what differs from the common ones.
        ranges: fields of :class:`ShapeRanges` common to all.

    Raises:
        VipLlavaError: naming every unknown field, unknown shape or colour, and reversed range.
    """
    problems: list[str] = []
    built: dict[str, VisualPromptPolicy] = {}
    common = ShapeRanges()
    try:
        common = ShapeRanges(**_as_tuples(ranges or {}, ShapeRanges))
    except VipLlavaError as error:
        problems.append(f"visual_prompts.{error}")
    for name, spec in policies.items():
        try:
            values = _as_tuples(spec, VisualPromptPolicy)
            own = _as_tuples(values.pop("ranges", None) or {}, ShapeRanges)
            built[name] = VisualPromptPolicy(**values, ranges=replace(common, **own))
        except VipLlavaError as error:
            problems.append(f"visual_prompts.policies.{name}: {error}")
    if problems:
        raise VipLlavaError("\n".join(problems))
    return built


def get_policy(policies: Mapping[str, VisualPromptPolicy], name: str) -> VisualPromptPolicy:
    """Return the policy called ``name``; an unknown name lists the known ones."""
    if name not in policies:
        known = ", ".join(sorted(policies)) or "none"
        raise VipLlavaError(f"unknown visual-prompt policy `{name}`; known: {known}")
    return policies[name]


def _as_tuples(values: Any, kind: type) -> dict[str, Any]:
    """Return the fields of ``kind`` that a section of YAML gives, lists as tuples."""
    known = [f.name for f in fields(kind)]
    where = "ranges: " if kind is ShapeRanges else ""
    if not isinstance(values, Mapping):
        raise VipLlavaError(f"{where}{values!r} is no section; it may have {', '.join(known)}")
    section = cast("Mapping[Any, Any]", values)
    if unknown := sorted(set(map(str, section)) - set(known)):
        raise VipLlavaError(f"{where}unknown fields {unknown}; known: {', '.join(known)}")
    return {
        str(k): tuple(cast("list[Any]", v)) if isinstance(v, list) else v
        for k, v in section.items()
    }
