"""Regions in the words of JSON Schema; what they mean is checked where marks are parsed."""

from __future__ import annotations

from typing import Any, Final, get_args

from vipllava.types import Shape
from vipllava.visual_prompts.mark_places import MOST_POINTS
from vipllava.visual_prompts.marks import MOST_MARKS
from vipllava.visual_prompts.shapes import PALETTE

_PLACES: Final = ("box", "polygon", "rle", "point", "stroke")
_NUMBER: Final = {"type": "number", "minimum": -1e7, "maximum": 1e7}
_POINT: Final = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
_RING: Final = {"type": "array", "items": _POINT, "minItems": 3, "maxItems": MOST_POINTS}
_CHANNEL: Final = {"type": "integer", "minimum": 0, "maximum": 255}
_COLOUR: Final[dict[str, Any]] = {
    "description": "A colour that texts name, or red, green and blue.",
    "anyOf": [
        {"type": "string", "enum": list(PALETTE)},
        {"type": "array", "items": _CHANNEL, "minItems": 3, "maxItems": 3},
        {"type": "null"},
    ],
}

REGION: Final[dict[str, Any]] = {
    "type": "object",
    "title": "Region",
    "description": "A mark: a shape, one of its places in pixels of the upright image, a look.",
    "required": ["shape"],
    "additionalProperties": False,
    "oneOf": [{"required": [name]} for name in _PLACES],
    "properties": {
        "shape": {"type": "string", "enum": list(get_args(Shape))},
        "box": {
            "type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4,
            "description": "x1, y1, x2, y2",
        },
        "polygon": {
            "description": "A ring of points, or several of them.",
            "anyOf": [_RING, {"type": "array", "items": _RING, "minItems": 1}],
        },
        "rle": {
            "type": "object",
            "description": "A mask as COCO stores it.",
            "required": ["size", "counts"],
            "additionalProperties": False,
            "properties": {
                "size": {
                    "type": "array", "items": {"type": "integer", "minimum": 1},
                    "minItems": 2, "maxItems": 2, "description": "height, width",
                },
                "counts": {
                    "anyOf": [
                        {"type": "string"},
                        {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    ]
                },
            },
        },
        "point": _POINT,
        "stroke": {
            "type": "array", "items": _POINT, "minItems": 2, "maxItems": MOST_POINTS,
            "description": "Points of a line drawn by hand.",
        },
        "colour": _COLOUR,
        "color": _COLOUR,
        "width": {
            "anyOf": [{"type": "integer", "minimum": 1, "maximum": 10_000}, {"type": "null"}],
            "description": "Of lines, pixels; a point's radius.",
        },
        "alpha": {
            "anyOf": [{"type": "integer", "minimum": 1, "maximum": 255}, {"type": "null"}],
            "description": "Opacity.",
        },
        "seed": {
            "type": "integer", "minimum": 0, "maximum": 2**63 - 1,
            "description": "Of what is drawn from chance.",
        },
        "image": {
            "type": "integer", "minimum": 0, "maximum": 0,
            "description": "Number of the image in the conversation.",
        },
    },
}  # fmt: skip

REGIONS: Final[dict[str, Any]] = {
    "description": "Marks to draw on the image; texts name them as `{0}`, `{1}`, ...",
    "anyOf": [{"type": "array", "items": REGION, "maxItems": MOST_MARKS}, {"type": "null"}],
}
