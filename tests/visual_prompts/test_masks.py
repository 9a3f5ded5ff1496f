"""Regions with a mask in run lengths: every shape drawn in them, holes left open."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from vipllava.keyed_random import generator_for
from vipllava.types import RecordError, Region, RunLengths, Shape, VipLlavaError, VisualPrompt
from vipllava.visual_prompts.policies import POLICIES, VisualPromptPolicy
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.rle import check_rle
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import SHAPES

SIZE = (320, 240)
BOX = (70.0, 40.0, 231.0, 201.0)
_REACH = np.hypot(*(np.indices((240, 320)) - np.array([120, 150])[:, None, None]))
RING = (_REACH <= 80) & (_REACH >= 45)
HOLE = _REACH < 45


def region_of(mask: np.ndarray, bbox: tuple[float, float, float, float] = BOX) -> Region:
    return Region(bbox, rle=check_rle(mask, "mask"))


def mark_of(
    shape: Shape, seed: int = 0, region: Region | None = None, **policy: Any
) -> VisualPrompt:
    """Return the mark of a region, the ring's unless another is given."""
    chosen = VisualPromptPolicy(shapes=(shape,), **policy)
    region = region or region_of(RING)
    return sample_plan([region], SIZE, chosen, generator_for("test", seed)).prompts[0]


def painted(prompt: VisualPrompt, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return what a mark paints, bool [height, width]."""
    canvas = Image.new("L", size)
    if (found := mark_opacity(prompt, size)) is not None:
        canvas.paste(*found)
    return np.asarray(canvas) > 0


def centre(prompt: VisualPrompt) -> tuple[int, int]:
    """Return row and column of the pixel in the middle of a point."""
    (x1, y1), (x2, y2) = prompt.strokes[0].points
    return int((y1 + y2) / 2), int((x1 + x2) / 2)


def test_a_ring_drawn_as_mask_leaves_its_hole_unpainted():
    assert np.array_equal(painted(mark_of("mask")), RING)


def test_the_contour_goes_round_the_hole_too():
    lines = painted(mark_of("mask contour"))
    width = mark_of("mask contour").strokes[0].width // 2
    assert lines[120, 150 - 80] and lines[120, 150 - 45]  # noqa: PT018
    assert not lines[45 - 2 * width - 2 > _REACH].any()
    assert not lines[(46 + 2 * width < _REACH) & (79 - 2 * width > _REACH)].any()


@pytest.mark.parametrize("name", ["regions", "vcr"])
@pytest.mark.parametrize("of", ["published", "evaluation"])
def test_its_point_never_falls_into_the_hole(of: str, name: str):
    policy = POLICIES[of][name]
    fixed = VisualPromptPolicy(
        shapes=("point",), released_point_jitter=policy.released_point_jitter
    )
    places = set()
    for seed in range(300):
        plan = sample_plan([region_of(RING)], SIZE, fixed, generator_for("hole", seed))
        places.add(centre(plan.prompts[0]))
    assert all(RING[place] for place in places)
    assert len(places) > 250


def test_a_point_of_a_mask_without_a_hole_is_near_its_middle():
    disc = _REACH <= 80
    rows, columns = np.array([centre(mark_of("point", n, region_of(disc))) for n in range(300)]).T
    assert abs(rows.mean() - 120) < 4
    assert 15 < columns.std() < 25  # an eighth of 160


def test_corners_ends_and_tips_lie_on_the_mask():
    for seed in range(100):
        for x, y in mark_of("triangle", seed).strokes[0].points:
            assert RING[int(y), int(x)]
        curve = mark_of("scribble", seed).strokes[0].points
        shaft = mark_of("arrow", seed).strokes[0].points
        for x, y in (curve[0], curve[-1], shaft[0]):
            assert RING[int(y), int(x)]


def test_an_arrow_that_points_at_the_mask_anyway_is_that_of_the_box():
    disc = _REACH <= 100
    for seed in range(30):
        assert mark_of("arrow", seed, region_of(disc)) == mark_of("arrow", seed, Region(BOX))


def test_box_and_ellipse_are_those_of_box_and_bounds():
    assert mark_of("rectangle").strokes[0].points == (BOX[:2], BOX[2:])
    bounds = ((70.0, 40.0), (230.0, 40.0), (230.0, 200.0), (70.0, 200.0))
    for seed in range(20):
        assert mark_of("ellipse", seed) == mark_of("ellipse", seed, Region(BOX, (bounds,)))


def test_what_lies_inside_lies_in_the_largest_piece():
    specks = RING.copy()
    specks[2:5, 2:300:8] = specks[230:238, 10:30] = True
    for shape in ("point", "triangle", "scribble", "arrow"):
        for seed in range(20):
            same = region_of(specks)
            assert mark_of(shape, seed, same) == mark_of(shape, seed), shape
    assert np.array_equal(painted(mark_of("mask", region=region_of(specks))), specks)


def test_a_line_of_pixels_is_a_mask():
    line = np.zeros((240, 320), bool)
    line[50:100, 77] = True
    for seed in range(20):
        row, column = centre(mark_of("point", seed, region_of(line)))
        assert line[row, column]
        assert mark_of("triangle", seed, region_of(line)).strokes[0].points[1:] == (
            (77.0, 99.0),
            (77.0, 50.0 + 49.0),
        )


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    mask=arrays.arrays(bool, st.tuples(st.integers(8, 40), st.integers(8, 40))).filter(np.any),
    seed=st.integers(0, 99),
)
def test_any_mask_is_drawn_in_any_shape(shape: Shape, mask: np.ndarray, seed: int):
    height, width = mask.shape
    region = region_of(mask, (0.0, 0.0, float(width), float(height)))
    policy = VisualPromptPolicy(shapes=(shape,))
    plans = [
        sample_plan([region], (width, height), policy, generator_for("any", seed)) for _ in "ab"
    ]
    assert plans[0] == plans[1]
    assert painted(plans[0].prompts[0], (width, height)).any()


def test_a_mask_of_another_size_and_an_empty_one_are_refused():
    for mask, size, message, fault in (
        (RING, (320, 200), "rle.size is [240, 320]; expected [200, 320]", "mask-size"),
        (RING, (240, 320), "these are width and height, or those before its EXIF", "mask-size"),
        (RING & ~RING, SIZE, "rle is a mask without a pixel", "mask-invalid"),
    ):
        with pytest.raises(RecordError, match=re.escape(message)) as caught:
            sample_plan([region_of(mask)], size, VisualPromptPolicy(), generator_for(0))
        assert caught.value.fault == fault


def test_run_lengths_that_nobody_checked_are_refused_where_they_are_drawn():
    region = Region(BOX, rle=RunLengths((240, 320), "5"))
    with pytest.raises(RecordError, match="counts is 1 lengths of 5 pixels in all"):
        sample_plan([region], SIZE, VisualPromptPolicy(), generator_for(0))


def test_a_region_has_one_mask_and_is_small_when_it_travels():
    rle = check_rle(RING, "mask")
    with pytest.raises(VipLlavaError, match=r"polygons, or as RunLengths.*got 1 polygons and Run"):
        Region(BOX, (((0, 0), (9, 0), (9, 9)),), rle=rle)
    with pytest.raises(VipLlavaError, match="got 0 polygons and dict"):
        Region(BOX, rle={"size": [1, 1], "counts": [1]})  # type: ignore[arg-type]
    region = Region(BOX, rle=rle)
    assert pickle.loads(pickle.dumps(region)) == region
    assert len(pickle.dumps(region)) < len(rle.counts) + 300
