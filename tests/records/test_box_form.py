"""In which form the boxes of a data set are written."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vipllava.records.box_form import box_form, box_signs
from vipllava.records.kind import boxes

SIZE = (640, 480)


def form(rows: list[list[float]], size: tuple[int, int] = SIZE) -> str | None:
    signs: Counter[str] = Counter()
    for row in rows:
        signs.update(box_signs(boxes({"bboxes": [row]}), size))
    return box_form(signs)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Return boxes anywhere in the image, x1, y1, x2, y2 in pixels."""
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * SIZE
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).round(1)


@pytest.mark.parametrize("seed", range(20))
def test_each_form_is_told_from_pixels(seed: int) -> None:
    pixels = drawn(30, seed)
    assert form(pixels.tolist()) is None
    fractions = pixels / [*SIZE, *SIZE]
    sizes = pixels.copy()
    sizes[:, 2:] -= sizes[:, :2]
    assert "fractions of the image" in str(form(fractions.tolist()))
    assert "per cent of the image" in str(form((100 * fractions).tolist()))
    assert "they look like COCO's boxes" in str(form(sizes.tolist()))


def test_what_is_said() -> None:
    coco = [[300, 200, 90, 80], [10, 10, 50, 60], [500, 20, 140, 30]]
    assert form(coco) == (
        "all 3 boxes fit their images as x, y, width, height, and 2 of them are reversed as x1, "
        "y1, x2, y2: they look like COCO's boxes; boxes are x1, y1, x2, y2 in pixels: write x, y, "
        "x + width, y + height"
    )


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([[0.1, 0.1, 0.5, 0.9]] * 2, SIZE),  # too few to tell
        ([[10, 10, 60, 95]] * 19, SIZE),  # a few, near the corner
        ([[10, 10, 60, 95]] * 30, (120, 100)),  # an image of about a hundred pixels
        ([[10, 10, 40, 50]] * 30, SIZE),  # nothing near a hundred
        ([[10, 10, 60, 95]] * 30 + [[200, 9, 300, 99]], SIZE),
        ([[10, 10, 40, 50]] * 30 + [[190, 20, 180, 50]], SIZE),  # one slip
        ([[9, 9], "box", None, [1, 2, "3", 4]] * 3, SIZE),  # the parser's to refuse
        ([], SIZE),
    ],
)
def test_nothing_is_said_of_others(rows: list[list[float]], size: tuple[int, int]) -> None:
    assert form(rows, size) is None
