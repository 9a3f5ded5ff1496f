"""Marks as fields of JSON: what server, page and terminal read and write.

One mark is an object, e.g. ``{"shape": "arrow", "box": [10, 20, 60, 80], "colour": "red"}``; its
fields are those of :class:`vipllava.visual_prompts.marks.Mark`, and ``image``, the number of the
picture that it is on, where a conversation has several.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from vipllava.types import RunLengths, Shape
from vipllava.visual_prompts.mark_places import Described, MarkError
from vipllava.visual_prompts.marks import MARKS, MOST_MARKS, Mark

_PLACES: Final = ("box", "polygon", "rle", "point", "stroke")
_LOOK: Final = ("colour", "width", "alpha", "seed")
_FIELDS: Final = ("shape", *_PLACES, *_LOOK, "image")


class PlacedMark(NamedTuple):
    """A mark, and the number of the picture that it is on: 0 is a conversation's first."""

    mark: Mark
    image: int = 0


def parse_marks(value: object, where: str = "regions") -> list[Mark]:
    """Read the marks on one picture.

    Args:
        value: a list of objects as of JSON; anything may stand in it.
        where: begins the field of errors.

    Raises:
        MarkError: naming the first field that means nothing, e.g. ``regions[2].box``.
    """
    placed = parse_placed_marks(value, where, num_images=1)
    return [each.mark for each in placed]


def parse_placed_marks(
    value: object, where: str = "regions", *, num_images: int
) -> list[PlacedMark]:
    """Read the marks on the pictures of a conversation, in their order.

    Args:
        value: see :func:`parse_marks`, as ``where``.
        where: begins the field of errors.
        num_images: how many pictures there are.

    Raises:
        MarkError: see :func:`parse_marks`; or the conversation has no such picture.
    """
    if not isinstance(value, (list, tuple)):
        raise MarkError(where, value, "a list of objects, one for each mark")
    items = cast("list[object]", value)
    if len(items) > MOST_MARKS:
        raise MarkError(where, Described(f"a list of {len(items)}"), f"at most {MOST_MARKS} marks")
    placed: list[PlacedMark] = []
    for number, item in enumerate(items):
        place = f"{where}[{number}]"
        if not isinstance(item, Mapping):
            expected = f"an object of {', '.join(_FIELDS)}"
            raise MarkError(place, item, expected)
        try:
            placed.append(_parse_one(cast("Mapping[Any, Any]", item), num_images))
        except MarkError as error:
            raise error.at(place) from error
    return placed


def mark_to_fields(mark: Mark, image: int = 0) -> dict[str, Any]:
    """Return a mark as :func:`parse_placed_marks` reads it; what has its default is left out."""
    fields: dict[str, Any] = {"shape": mark.shape}
    for name in (*_PLACES, *_LOOK):
        value = getattr(mark, name)
        if isinstance(value, RunLengths):
            fields[name] = {"size": list(value.size), "counts": value.counts}
        elif value is not None and not (name == "seed" and value == 0):
            fields[name] = _as_lists(value)
    return fields | ({"image": image} if image else {})


def _parse_one(item: Mapping[Any, Any], num_images: int) -> PlacedMark:
    fields = dict(item)
    if "color" in fields:
        if "colour" in fields:
            raise MarkError("color", fields["color"], "one of color and colour, not both")
        fields["colour"] = fields.pop("color")
    for name in fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1) if isinstance(name, str) else []
            known = f"`{near[0]}`, perhaps" if near else f"one of {', '.join(_FIELDS)}"
            shown = name if isinstance(name, str) and len(name) <= 40 else "a field"
            raise MarkError(shown, fields[name], f"no such field, but {known}")
    image = fields.pop("image", 0)
    if type(image) is not int or not 0 <= image < num_images:
        numbers = f"a number from 0 to {num_images - 1}" if num_images > 1 else "0"
        expected = f"{numbers}: there are {num_images} pictures" if num_images != 1 else "0"
        raise MarkError(
            "image", image, expected if num_images else "no region: no picture is there"
        )
    shape = fields.pop("shape", None)
    if not isinstance(shape, str) or shape not in MARKS:
        raise MarkError("shape", shape, f"one of {', '.join(MARKS)}")
    kind = MARKS[cast("Shape", shape)]
    if fields.get("seed", 0) is None:  # what is null is not given
        del fields["seed"]
    return PlacedMark(kind(**fields), image)


def _as_lists(value: Any) -> Any:
    """Return tuples as JSON has them, points and colours alike."""
    if not isinstance(value, tuple):
        return value
    return [_as_lists(each) for each in cast("tuple[Any, ...]", value)]
