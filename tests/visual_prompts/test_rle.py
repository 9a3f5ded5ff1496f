"""Run lengths: those of pycocotools, and the same pixels by the training renderer."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from vipllava.types import Stroke, VisualPrompt
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.mask_outlines import outlines_of_mask
from vipllava.visual_prompts.mask_pixels import MaskPixels, moved_mask
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.rle import MOST_RUNS, check_rle, mask_of_rle, rle_of_mask

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def painted(strokes: list[Stroke], size: tuple[int, int]) -> np.ndarray:
    """Return what the training renderer paints, bool [height, width]."""
    canvas = Image.new("L", size)
    found = mark_opacity(VisualPrompt(0, "mask", (0, 0, 0), None, 255, tuple(strokes)), size)
    if found is not None:
        canvas.paste(found[0], found[1])
    return np.asarray(canvas) > 0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask with a side or a corner outside of it."""
    padded = np.pad(mask, 1)
    shape = mask.shape
    near = [padded[y : y + shape[0], x : x + shape[1]] for y in range(3) for x in range(3)]
    return mask & ~np.all(near, axis=0)


def pixels_of(mask: np.ndarray) -> MaskPixels:
    return MaskPixels.of(check_rle(mask, "mask"))


def blobs(width: int, height: int) -> np.ndarray:
    image = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((width * 0.1, height * 0.1, width * 0.7, height * 0.9), fill=1)
    canvas.ellipse((width * 0.3, height * 0.3, width * 0.5, height * 0.6), fill=0)
    canvas.rectangle((width * 0.8, height * 0.2, width, height * 0.3), fill=1)
    return np.asarray(image) > 0


@given(MASKS)
def test_a_mask_is_packed_as_pycocotools_packs_it_and_comes_back(mask: np.ndarray):
    theirs: Any = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = rle_of_mask(mask)
    assert ours["counts"].encode() == theirs["counts"]
    assert ours["size"] == list(theirs["size"])
    for counts in (theirs["counts"], ours["counts"]):
        rle = check_rle({"size": ours["size"], "counts": counts}, "rle")
        assert np.array_equal(mask_of_rle(rle), mask)


@given(MASKS)
def test_lengths_in_a_list_are_the_same_mask(mask: np.ndarray):
    flat, lengths, inside = mask.ravel(order="F").tolist(), [0], False
    for pixel in flat:
        if pixel != inside:
            lengths.append(0)
            inside = pixel
        lengths[-1] += 1
    listed = check_rle({"size": list(mask.shape), "counts": lengths}, "rle")
    assert listed == check_rle(mask, "rle")
    assert np.array_equal(mask_of_rle(listed), mask)


@given(MASKS)
def test_the_boxes_paint_the_mask_and_nothing_else(mask: np.ndarray):
    strokes = [Stroke("box", ((x1, y1), (x2, y2))) for x1, y1, x2, y2 in pixels_of(mask).boxes()]
    size = (mask.shape[1], mask.shape[0])
    assert np.array_equal(painted(strokes, size) if strokes else np.zeros_like(mask), mask)


@given(MASKS)
def test_the_outlines_are_the_boundary_and_nothing_else(mask: np.ndarray):
    strokes = [Stroke("contour", ring, 1) for ring in outlines_of_mask(mask)]
    size = (mask.shape[1], mask.shape[0])
    lines = painted(strokes, size) if strokes else np.zeros_like(mask)
    assert np.array_equal(lines, boundary(mask))


@given(MASKS)
def test_pixels_are_those_of_the_mask(mask: np.ndarray):
    pixels = pixels_of(mask)
    assert pixels.area == mask.sum()
    if not mask.any():
        return
    corners = np.indices(mask.shape)[::-1].reshape(2, -1).T
    above, right = corners - np.array([0, 99]), corners + np.array([99, 0])
    around = np.concatenate([corners, corners + 0.999, above, right])
    flat = mask.ravel()
    outside = np.zeros_like(flat)
    assert np.array_equal(pixels.contains(around), np.concatenate([flat, flat, outside, outside]))
    y, x = np.nonzero(mask)
    assert pixels.bounds == (x.min(), y.min(), x.max(), y.max())
    assert pixels.outlines() == outlines_of_mask(mask)
    drawn = np.array(pixels.sample(300, np.random.default_rng(0)))
    assert pixels.contains(drawn).all()
    assert mask.sum() > 20 or len(np.unique(drawn, axis=0)) == mask.sum()
    near_x, near_y = pixels.nearest((3.2, -1))
    distances = np.hypot(x + 0.5 - 3.2, y + 0.5 + 1)
    assert np.hypot(near_x - 3.2, near_y + 1) == pytest.approx(distances.min())
    assert mask[int(near_y), int(near_x)]


def test_every_pixel_is_drawn_as_often():
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2] = mask[4, 2:6] = mask[0, 5] = True
    drawn = pixels_of(mask).sample(8000, np.random.default_rng(1))
    places, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(places) == mask.sum() == 8
    assert (abs(counts - 1000) < 150).all()


def pieces(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Return the pieces of a mask by walking from pixel to pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found: list[set[tuple[int, int]]] = []
    while left:
        piece, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            piece.add((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
        found.append(piece)
    return found


@given(MASKS.filter(np.any))
def test_the_largest_piece(mask: np.ndarray):
    kept = pixels_of(mask).largest_piece()
    ys, xs = np.nonzero(mask)
    on = kept.contains(np.stack([xs, ys], axis=1).astype(float))
    found = {(int(y), int(x)) for y, x in zip(ys[on], xs[on], strict=True)}
    every = pieces(mask)
    assert found in every
    assert len(found) == kept.area == max(map(len, every))


@given(MASKS.filter(np.any), st.floats(-15, 15), st.floats(-15, 15))
def test_a_mask_is_moved_as_far_as_it_stays_in_its_image(mask: np.ndarray, dx: float, dy: float):
    moved = moved_mask(check_rle(mask, "mask"), (dx, dy))
    y, x = np.nonzero(mask)
    height, width = mask.shape
    by_x = min(max(round(dx), -x.min()), width - 1 - x.max())
    by_y = min(max(round(dy), -y.min()), height - 1 - y.max())
    expected = np.zeros_like(mask)
    expected[y + by_y, x + by_x] = True
    assert np.array_equal(mask_of_rle(moved), expected)
    assert moved == check_rle(expected, "mask")


def test_a_piece_with_a_hole_has_two_outlines_and_pixels_touching_by_a_corner_one_each():
    ring = np.ones((5, 6), bool)
    ring[2, 2:4] = False
    assert outlines_of_mask(ring) == (
        ((0, 0), (5, 0), (5, 4), (0, 4)),
        ((1, 1), (1, 3), (4, 3), (4, 1)),
    )
    corner = np.eye(2, dtype=bool)
    assert outlines_of_mask(corner) == (((0, 0),) * 4, ((1, 1),) * 4)
    assert outlines_of_mask(np.zeros((2, 2), bool)) == ()


def test_a_mask_of_twelve_megapixels():
    mask = blobs(4000, 3000)
    rle = check_rle(rle_of_mask(mask), "rle")
    assert np.array_equal(mask_of_rle(rle), mask)
    strokes = [Stroke("box", ((x1, y1), (x2, y2))) for x1, y1, x2, y2 in pixels_of(mask).boxes()]
    assert np.array_equal(painted(strokes, (4000, 3000)), mask)
    assert len(outlines_of_mask(mask)) == 3


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ("04", 'rle is \'04\'; expected an object {"size": [height, width], "counts": '),
        ({"size": [2, 2]}, "rle is an object of ['size']; expected an object"),
        ({"size": [2, 2], "counts": [4], "mask": 1}, "['counts', 'mask', 'size']"),
        ({"size": [2], "counts": [4]}, "rle.size is [2]; expected [height, width] of the image"),
        ({"size": [2, True], "counts": [4]}, "rle.size is [2, True]; expected"),
        ({"size": [0, 2], "counts": [0]}, "rle.size is [0, 2]; expected"),
        ({"size": [65535, 65535], "counts": [4]}, "expected at most 100000000 pixels"),
        ({"size": [2, 2], "counts": [5]}, "is 1 lengths of 5 pixels in all; expected 2 x 2 = 4"),
        ({"size": [2, 2], "counts": []}, "is 0 lengths of 0 pixels in all; expected 2 x 2 = 4"),
        ({"size": [2, 2], "counts": ""}, "is 0 lengths of 0 pixels in all; expected 2 x 2 = 4"),
        ({"size": [2, 2], "counts": [-1, 5]}, "rle.counts[0] is -1; expected a whole number"),
        ({"size": [2, 2], "counts": [10**300]}, "rle.counts[0] is 1000"),
        ({"size": [2, 2], "counts": [4.0]}, "rle.counts[0] is 4.0"),
        ({"size": [2, 2], "counts": [True, 3]}, "rle.counts[0] is True"),
        ({"size": [2, 2], "counts": None}, "rle.counts is None; expected letters, or a list"),
        ({"size": [2, 2], "counts": {"a": 1}}, "rle.counts is {'a': 1}; expected letters"),
        ({"size": [2, 2], "counts": "4 "}, "COCO's letters from `0` to `o`, not b' '"),
        ({"size": [2, 2], "counts": b"4\xff"}, "COCO's letters from `0` to `o`, not b'\\xff'"),
        ({"size": [2, 2], "counts": "4\u00b2"}, "COCO's letters, from `0` to `o` in ASCII"),
        ({"size": [2, 2], "counts": "o"}, "a last length that ends: the text is cut off"),
        ({"size": [2, 2], "counts": "oooooooo0"}, "expected at most 7 letters a length"),
        ({"size": [2, 2], "counts": "@"}, "a text whose length 0 is -16"),
        ({"size": [2, 2], "counts": "oooooo7"}, "expected lengths from 0 to 100000000"),
        (
            {"size": [2, 2], "counts": [0] * (MOST_RUNS + 1)},
            "rle.counts is of 100001 lengths; expected at most",
        ),
        ({"size": [2, 2], "counts": "0" * (MOST_RUNS + 1)}, "expected at most 100000: smooth"),
        ({"size": [2, 2], "counts": "0" * (8 * MOST_RUNS)}, "expected at most 100000: smooth"),
        (np.zeros((2, 2)), "is an array of float64, [2, 2]; expected truth values"),
        (np.zeros((2, 2, 1), bool), "is an array of bool, [2, 2, 1]; expected truth values"),
        (np.zeros((0, 2), bool), "is an array of bool, [0, 2]; expected truth values"),
        (np.indices((400, 400)).sum(0) % 2 > 0, "expected at most 100000: smooth the mask"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(rle: object, message: str):
    with pytest.raises(MarkError, match=re.escape(message)):
        check_rle(rle, "rle")


@given(st.text(max_size=30) | st.binary(max_size=30) | st.lists(st.integers(), max_size=9))
def test_any_counts_are_a_mask_or_a_mark_error(counts: object):
    try:
        rle = check_rle({"size": [3, 4], "counts": counts}, "rle")
    except MarkError:
        return
    assert mask_of_rle(rle).shape == (3, 4)


# pycocotools 2 is older than numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@given(st.lists(st.integers(0, 12), max_size=9))
def test_lengths_of_nothing_are_read_as_pycocotools_reads_them(lengths: list[int]):
    lengths = [n for n, total in zip(lengths, np.cumsum(lengths), strict=True) if total <= 12]
    lengths.append(12 - sum(lengths))
    listed = {"size": [3, 4], "counts": lengths}
    theirs: Any = coco.frPyObjects(listed, 3, 4)
    ours = check_rle(listed, "rle")
    assert ours.counts.encode() == theirs["counts"]
    mask = coco.decode(theirs) > 0
    assert np.array_equal(mask_of_rle(ours), mask)
    assert MaskPixels.of(ours).boxes() == pixels_of(mask).boxes()
