"""In which form the boxes of a whole data set are written: one box alone does not tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from vipllava.records.fields import is_number, list_or_empty
from vipllava.records.kind import Outline

_LEAST_BOXES: Final = 3
_LEAST_BOXES_PER_CENT: Final = 20
"""A few boxes in pixels may well lie within 100 pixels of the corner; all of many do not."""
_LEAST_SIDE: Final = 150
"""Pixels: boxes within 0..100 of smaller images may be in pixels."""
_SLACK: Final = 1.0  # pixels; annotations count the last one or do not
_LEAST_REVERSED: Final = 0.1
"""Share of boxes that x, y, width, height reverses: three quarters for boxes anywhere in an image,
hardly any where objects fill it. Data in x1, y1, x2, y2 have none, but for slips."""


def box_signs(outlines: Iterable[Outline], size: tuple[int, int]) -> Counter[str]:
    """Count what the boxes of a record look like; sums of these go to :func:`box_form`.

    ``size``: width and height of the upright image, pixels.
    """
    signs: Counter[str] = Counter()
    width, height = size
    for box in outlines:
        values = list_or_empty(box.value)[:4]
        if box.form != "box" or len(values) < 4 or not all(map(is_number, values)):
            continue
        a, b, c, d = values
        signs["boxes"] += 1
        signs["within_1"] += min(a, b, c, d) >= 0 and max(a, b, c, d) <= 1
        within_100 = min(a, b, c, d) >= 0 and max(a, b, c, d) <= 100
        signs["within_100"] += within_100 and min(width, height) >= _LEAST_SIDE
        signs["near_100"] += max(a, b, c, d) > 80
        signs["reversed"] += c < a or d < b
        signs["fits_as_size"] += (
            min(a, b) >= 0 < min(c, d) and a + c <= width + _SLACK and b + d <= height + _SLACK
        )
    return signs


def box_form(signs: Counter[str]) -> str | None:
    """Say what the boxes of a data set seem to be, if it is not x1, y1, x2, y2 in pixels."""
    count = signs["boxes"]
    if count < _LEAST_BOXES:
        return None
    found, remedy = None, "multiply x by the image's width and y by its height"
    if signs["within_1"] == count:
        found = "lie within 0..1: they look like fractions of the image"
    elif count >= _LEAST_BOXES_PER_CENT and signs["within_100"] == count and signs["near_100"]:
        found = "lie within 0..100, in larger images: they look like per cent of the image"
        remedy += ", divided by 100"
    elif signs["fits_as_size"] == count and signs["reversed"] >= _LEAST_REVERSED * count:
        found = (
            f"fit their images as x, y, width, height, and {signs['reversed']} of them are "
            "reversed as x1, y1, x2, y2: they look like COCO's boxes"
        )
        remedy = "write x, y, x + width, y + height"
    if found is None:
        return None
    return f"all {count} boxes {found}; boxes are x1, y1, x2, y2 in pixels: {remedy}"
