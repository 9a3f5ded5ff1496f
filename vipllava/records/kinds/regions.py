"""Users' own records: boxes, optional masks and marks, and a conversation about them.

``{"bboxes", "segmentations"?, "visual_prompts"?, "conversations"}`` with ``<bbox0>``, ``<bbox1>``
and so on anywhere in the texts. ``visual_prompts`` has one entry per box: null, or an object that
fixes any of ``shape``, ``colour`` (a palette name or [r, g, b]), ``width`` and ``alpha``. Every box
is marked, mentioned or not. ``bbox`` is read as ``bboxes``: so the original's documentation says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import CONVERSATIONS, RecordKind, boxes_and_masks
from vipllava.types import FixedVisualPrompt, VipLlavaError
from vipllava.visual_prompts.shapes import check_shape, named_colour

_KNOWN: Final = ("shape", "colour", "width", "alpha")


def parse_regions(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return conversation, regions and what is fixed about their marks."""
    regions = fields.regions()
    if not regions:
        fields.fail("bboxes", [], "at least one box; a record without is an image-level one")
    if max(max(region.bbox_xyxy) for region in regions) <= 1:
        reason = "one pixel in the corner; these look like fractions: multiply by width and height"
        fields.fail("bboxes", fields.record["bboxes"], f"pixels, not {reason}", "box-fractions")
    turns = fields.conversation(num_regions=len(regions))
    fixed: tuple[FixedVisualPrompt, ...] = ()
    if fields.record.get("visual_prompts") is not None:
        values = fields.items("visual_prompts", f"one entry per box ({len(regions)})", len(regions))
        fixed = tuple(_fixed(fields, v, f"visual_prompts[{n}]") for n, v in enumerate(values))
    return Parsed(turns, regions, fixed)


def _fixed(fields: Fields, value: object, name: str) -> FixedVisualPrompt:
    if value is None:
        return FixedVisualPrompt()
    if not isinstance(value, Mapping):
        fields.fail(name, value, f"null or an object with any of {', '.join(_KNOWN)}")
    given = cast("Mapping[str, Any]", value)
    if unknown := sorted(set(given) - set(_KNOWN)):
        fields.fail(name, unknown, f"only {', '.join(_KNOWN)}")
    width, alpha = given.get("width"), given.get("alpha")
    widest = max(fields.size)  # one of ten million takes seconds to draw
    if width is not None and (type(width) is not int or not 1 <= width <= widest):
        expected = f"a line width of at least 1 pixel and at most {widest}, the image's longer side"
        fields.fail(f"{name}.width", width, expected)
    if alpha is not None and (type(alpha) is not int or not 1 <= alpha <= 255):
        fields.fail(f"{name}.alpha", alpha, "an opacity from 1 to 255")
    colour: Any = given.get("colour")
    try:
        shape = None if given.get("shape") is None else check_shape(str(given["shape"]))
        if isinstance(colour, str):
            named_colour(colour)
    except VipLlavaError as error:
        fields.refuse(f"{name}: {error}")
    if colour is not None and not isinstance(colour, str):
        expected = "a palette name or [red, green, blue], each from 0 to 255"
        channels = fields.as_list(colour, f"{name}.colour", expected, 3)
        if not all(type(channel) is int and 0 <= channel <= 255 for channel in channels):
            fields.fail(f"{name}.colour", channels, expected)
        colour = tuple(channels)
    return FixedVisualPrompt(shape, colour, width, alpha)


REGIONS = RecordKind(
    "regions",
    parse_regions,
    texts=(CONVERSATIONS,),
    policy="regions",
    fields=("bboxes", "segmentations", "visual_prompts", CONVERSATIONS),
    spellings=(("bbox", "bboxes"),),
    outlines=boxes_and_masks,
    mentions=(CONVERSATIONS, "bboxes"),
)
