"""The eight shapes and the nine colours: names, words in a text, and where a drawn mark ends.

Wordings are the ones the published checkpoints were trained with (source: ViP-LLaVA, CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, get_args

from vipllava.types import (
    RGB,
    BBox,
    DraftTurn,
    Mention,
    RecordError,
    Shape,
    Turn,
    VipLlavaError,
    VisualPrompt,
    VisualPromptPlan,
)

if TYPE_CHECKING:
    import numpy as np

SHAPES: Final[tuple[Shape, ...]] = get_args(Shape)

PALETTE: Final[dict[str, RGB]] = {
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "fuchsia": (255, 0, 255),
    "aqua": (0, 255, 255),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "gold": (255, 215, 0),
}
"""The colours a mark may be named by."""

LEAST_VISIBLE_PIXELS: Final = 4
"""So many pixels of the stored picture any mark paints at least, whatever its place, if its region
is ``LEAST_REGION_SIDE`` pixels wide and high. The mark of a smaller region, or of a mask without
area, paints one pixel at least. What reaches out of the picture is cut off."""
LEAST_REGION_SIDE: Final = 8

_PREPOSITIONS: Final[dict[Shape, str]] = {
    "rectangle": "within",
    "ellipse": "within",
    "triangle": "with",
    "point": "at",
    "scribble": "with",
    "mask contour": "with",
    "mask": "with",
    "arrow": "pointed to by",
}


def check_shape(name: str) -> Shape:
    """Return ``name`` as a shape; an unknown one lists the known ones."""
    if name not in SHAPES:
        raise VipLlavaError(f"unknown shape `{name}`; the shapes are: {', '.join(SHAPES)}")
    return name


def named_colour(name: object) -> RGB:
    """Return the RGB value of a palette colour; an unknown name lists the known ones."""
    if not isinstance(name, str) or name not in PALETTE:
        raise VipLlavaError(f"unknown colour `{name}`; the palette has: {', '.join(PALETTE)}")
    return PALETTE[name]


def shape_words(shape: Shape, colour_name: str | None, *, article: bool = True) -> str:
    """Return the words that name a mark, e.g. ``pointed to by the red arrow``."""
    words = [_PREPOSITIONS[shape], "the" if article else "", colour_name or "", shape]
    return " ".join(word for word in words if word)


def prompt_words(prompt: VisualPrompt) -> str:
    """Return the words of ``prompt``, with "the"."""
    return shape_words(prompt.shape, prompt.colour_name)


def refer_turns(
    turns: Sequence[DraftTurn], plan: VisualPromptPlan, rng: np.random.Generator
) -> tuple[Turn, ...]:
    """Replace every mention by the words of its region's mark.

    Whether they say "the" is drawn for each mention, as published: two of one mark may differ.

    Raises:
        RecordError: a mention of a region that the plan does not mark.
    """
    marks = {prompt.region: prompt for prompt in plan.prompts}

    def text_of(part: str | Mention) -> str:
        if isinstance(part, str):
            return part
        if part.region not in marks:
            raise RecordError(
                f"the text mentions region {part.region}, the plan marks {sorted(marks)}; "
                "every mentioned region needs a box",
                "placeholder-without-region",
            )
        mark, article = marks[part.region], bool(rng.random() < plan.article_rate)
        return shape_words(mark.shape, mark.colour_name, article=article)

    return tuple(Turn(t.role, "".join(map(text_of, t.parts)), t.has_image) for t in turns)


def mark_bounds(prompt: VisualPrompt) -> BBox:
    """Return x1, y1, x2, y2 (pixels, unclipped) outside which ``prompt`` paints nothing.

    Joints, ends and brushes reach at most the width beyond the points; one pixel more covers
    rounding.
    """
    xs, ys = zip(*(point for stroke in prompt.strokes for point in stroke.points), strict=True)
    kinds = ("line", "polygon", "contour")
    reach = 1 + max((s.width for s in prompt.strokes if s.kind in kinds), default=0)
    return min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach
