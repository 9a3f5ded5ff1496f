"""The plan: parameters within their ranges, colours by the rules, the same key the same plan."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vipllava.keyed_random import generator_for
from vipllava.types import FixedVisualPrompt, RecordError, Region, Shape, VipLlavaError
from vipllava.visual_prompts.geometry import contains, largest_angle
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import PALETTE, SHAPES, prompt_words

SIZE = (672, 448)  # s = 2
BOX = Region((100.0, 80.0, 260.0, 200.0))
HEXAGON = tuple(
    (180 + 80 * math.cos(k * math.pi / 3), 140 + 60 * math.sin(k * math.pi / 3)) for k in range(6)
)
MASKED = Region((100.0, 80.0, 260.0, 200.0), (HEXAGON,))


def one(shape: Shape, seed: int, region: Region = MASKED, **policy: object):
    """Sample the plan of one region with one shape and return its only prompt."""
    chosen = VisualPromptPolicy(shapes=(shape,), **policy)  # type: ignore[arg-type]
    return sample_plan([region], SIZE, chosen, generator_for("test", seed)).prompts[0]


def test_same_key_same_plan_other_key_other_plan():
    policy = VisualPromptPolicy()
    regions = [BOX, MASKED]
    plans = [
        sample_plan(regions, SIZE, policy, generator_for(42, epoch, "refcocog", "a"))
        for epoch in (0, 0, 1)
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_a_plan_is_pinned_by_its_key():
    """Literal: a change of these numbers changes every run's pictures."""
    assert generator_for(42, 0, "x", "y").integers(1 << 30) == 286709030
    prompt = sample_plan([BOX], SIZE, VisualPromptPolicy(), generator_for(42, 0, "x", "y")).prompts[
        0
    ]
    assert (prompt_words(prompt), prompt.rgb, prompt.alpha) == (
        "at the red point",
        (255, 0, 0),
        248,
    )


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [("rectangle", 4, 16), ("ellipse", 4, 16), ("triangle", 4, 16), ("scribble", 4, 24)],
)
def test_line_widths_scale_with_the_picture_and_reach_both_ends(shape: Shape, low: int, high: int):
    widths = {one(shape, seed).strokes[0].width for seed in range(400)}
    assert min(widths) == low
    assert max(widths) == high


@pytest.mark.parametrize(("side", "low", "high"), [(336, 2, 8), (1000, 5, 23), (60, 1, 1)])
def test_widths_are_whole_numbers_between_the_scaled_ends(side: int, low: int, high: int):
    """``int(2 * s)`` to ``int(8 * s)``, at least 1; s is the longer side over 336."""
    policy = VisualPromptPolicy(shapes=("rectangle",))
    widths = {
        sample_plan([Region((1, 1, 20, 20))], (side // 2, side), policy, generator_for(seed))
        .prompts[0]
        .strokes[0]
        .width
        for seed in range(400)
    }
    assert widths == set(range(low, high + 1))


def test_arrow_lines_scale_too():
    assert {one("arrow", seed).strokes[0].width for seed in range(300)} == set(range(2, 13))


def test_a_point_needs_no_mask():
    (x1, y1), (x2, y2) = one("point", 3, BOX).strokes[0].points
    assert 100 <= (x1 + x2) / 2 <= 260
    assert 80 <= (y1 + y2) / 2 <= 200


def test_constant_style_touches_rectangles_and_points_only():
    assert {one("rectangle", s, constant_style=True).strokes[0].width for s in range(20)} == {6}
    for seed in range(20):
        (x1, y1), (x2, y2) = one("point", seed, constant_style=True).strokes[0].points
        assert x2 - x1 == pytest.approx(32)
        assert y2 - y1 == pytest.approx(32)
    assert len({one("ellipse", s, constant_style=True).strokes[0].width for s in range(40)}) > 3


def test_ellipse_encloses_the_masks_bounds_enlarged_up_to_half():
    for seed in range(100):
        (x1, y1), (x2, y2) = one("ellipse", seed).strokes[0].points
        assert 160 - 1e-6 <= x2 - x1 <= 240 + 1e-6
        assert (x1 + x2) / 2 == pytest.approx(180)
        assert (y1 + y2) / 2 == pytest.approx(140)


def test_triangles_lie_in_the_mask_and_are_not_flat():
    for seed in range(100):
        corners = one("triangle", seed).strokes[0].points
        assert len(corners) == 3
        assert largest_angle(corners) <= 150
        assert contains(HEXAGON, np.array(corners)).all()


def test_a_region_without_width_still_gets_a_triangle():
    thin = Region((10.0, 50.0, 10.0625, 400.0))
    corners = one("triangle", 0, thin).strokes[0].points
    assert corners == ((10.03125, 50.0), (10.0625, 400.0), (10.0, 400.0))


def test_scribbles_stay_inside_the_convex_mask():
    for seed in range(50):
        points = np.array(one("scribble", seed).strokes[0].points)
        assert contains(HEXAGON, points[1:-1]).all()


def test_without_a_mask_the_box_is_the_shape():
    corners = ((100.0, 80.0), (260.0, 80.0), (260.0, 200.0), (100.0, 200.0))
    assert one("mask", 0, BOX).strokes[0].points == corners
    assert one("mask contour", 0, BOX).strokes[0].points == corners
    for seed in range(50):
        (x1, y1), (x2, y2) = one("ellipse", seed, BOX).strokes[0].points
        assert 160 <= x2 - x1 <= 240
        assert 120 <= y2 - y1 <= 180
        for shape in ("triangle", "scribble"):
            points = np.array(one(shape, seed, BOX).strokes[0].points)
            assert (points >= (100, 80)).all()
            assert (points <= (260, 200)).all()


def test_several_rings_are_drawn_together_and_scribbled_on_one():
    rings = tuple(((x, 80.0), (x + 40, 80.0), (x + 40, 200.0), (x, 200.0)) for x in (100.0, 220.0))
    region = Region(BOX.bbox_xyxy, rings)
    assert [stroke.points for stroke in one("mask", 0, region).strokes] == list(rings)
    assert [stroke.points for stroke in one("mask contour", 0, region).strokes] == list(rings)
    sides = set()
    for seed in range(60):
        xs = [x for x, _ in one("scribble", seed, region).strokes[0].points]
        assert max(xs) <= 140 or min(xs) >= 220
        sides.add(max(xs) <= 140)
        for x, _ in one("triangle", seed, region).strokes[0].points:
            assert x <= 140 or x >= 220
    assert sides == {True, False}


@pytest.mark.parametrize("shape", ["triangle", "scribble"])
def test_triangles_and_scribbles_are_never_specks(shape: Shape):
    """At least 4 pixels in the network's input, 8 here, as long as the region allows it."""
    small = Region((100.0, 80.0, 112.0, 92.0))
    for seed in range(200):
        points = np.array(one(shape, seed, small).strokes[0].points)
        assert np.ptp(points, axis=0).max() >= 8
    speck = Region((100.0, 80.0, 103.0, 83.0))
    points = np.array(one(shape, 0, speck).strokes[0].points)
    assert np.ptp(points, axis=0).tolist() == [3, 3]


def test_opacity_ranges():
    lines = {one("rectangle", seed).alpha for seed in range(600)}
    masks = {one("mask", seed).alpha for seed in range(600)}
    assert (min(lines), max(lines)) == (96, 255)
    assert (min(masks), max(masks)) == (48, 128)
    assert {one("mask", seed, fixed_alpha=128).alpha for seed in range(5)} == {128}


def test_a_shape_used_once_is_named_half_of_the_time():
    named = [one("rectangle", seed).colour_name is not None for seed in range(600)]
    assert 0.42 < np.mean(named) < 0.58


def test_repeated_shapes_get_distinct_names():
    policy = VisualPromptPolicy(shapes=("rectangle",))
    for seed in range(30):
        plan = sample_plan([BOX] * 9, SIZE, policy, generator_for("rep", seed))
        assert Counter(p.colour_name for p in plan.prompts) == dict.fromkeys(PALETTE, 1)
        assert all(p.rgb == PALETTE[p.colour_name or ""] for p in plan.prompts)


def test_more_repeats_than_names_fall_back_to_unnamed_or_are_refused():
    policy = VisualPromptPolicy(shapes=("rectangle",))
    plan = sample_plan([BOX] * 11, SIZE, policy, generator_for(0))
    assert sum(p.colour_name is None for p in plan.prompts) == 2
    strict = VisualPromptPolicy(shapes=("rectangle",), distinguishable=True)
    with pytest.raises(RecordError, match="10 regions cannot be told apart by words"):
        sample_plan([BOX] * 10, SIZE, strict, generator_for(0))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10_000))
def test_distinguishable_regions_have_different_words(count: int, seed: int):
    policy = VisualPromptPolicy(distinguishable=True)
    plan = sample_plan([MASKED] * count, SIZE, policy, generator_for("words", seed))
    words = [prompt_words(prompt) for prompt in plan.prompts]
    assert len(set(words)) == count


def test_regions_of_one_phrase_share_a_style():
    regions = [BOX, Region((300.0, 80.0, 400.0, 160.0), style_of=0)]
    for seed in range(30):
        first, second = sample_plan(
            regions, SIZE, VisualPromptPolicy(), generator_for("phrase", seed)
        ).prompts
        assert prompt_words(first) == prompt_words(second)
        assert (first.rgb, first.alpha) == (second.rgb, second.alpha)
        assert first.strokes != second.strokes


def test_a_style_can_only_come_from_an_earlier_region():
    with pytest.raises(RecordError, match="name an earlier region"):
        sample_plan(
            [Region(BOX.bbox_xyxy, style_of=1), BOX], SIZE, VisualPromptPolicy(), generator_for(0)
        )


def test_fixed_prompts_win_and_others_avoid_their_colour():
    policy = VisualPromptPolicy(shapes=("rectangle",))
    fixed = (FixedVisualPrompt("rectangle", "red", 7, 200), FixedVisualPrompt())
    for seed in range(30):
        first, second = sample_plan([BOX, BOX], SIZE, policy, generator_for(seed), fixed).prompts
        assert (first.rgb, first.colour_name, first.alpha) == ((255, 0, 0), "red", 200)
        assert first.strokes[0].width == 7
        assert second.colour_name not in ("red", None)


def test_unknown_fixed_values_list_the_known_ones():
    for fixed, known in (
        (FixedVisualPrompt(colour="green"), "lime"),
        (FixedVisualPrompt(shape="circle"), "ellipse"),  # type: ignore[arg-type]
    ):
        with pytest.raises(VipLlavaError, match=known):
            sample_plan([BOX], SIZE, VisualPromptPolicy(), generator_for(0), [fixed])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"colour": 5}, r"colour is 5; give a palette name or \[r, g, b\]"),
        ({"colour": (1, 2)}, r"colour is \(1, 2\); "),
        ({"colour": (300, 0, 0)}, r"colour is \(300, 0, 0\); "),
        ({"width": 0}, "width is 0; give a whole number of 1 or more"),
        ({"alpha": 256}, r"alpha is 256; give a whole number 1\.\.255"),
        ({"alpha": "x"}, "alpha is 'x'; "),
    ],
)
def test_what_cannot_be_drawn_is_refused_when_it_is_fixed(given: dict[str, Any], message: str):
    with pytest.raises(VipLlavaError, match=message):
        FixedVisualPrompt(**given)


def test_pointqa_is_red_and_does_not_say_so():
    prompt = one("rectangle", 1, colour="red", name_colour=False)
    assert prompt.rgb == (255, 0, 0)
    assert prompt_words(prompt) == "within the rectangle"


def test_every_shape_occurs():
    shapes = {
        sample_plan([MASKED], SIZE, VisualPromptPolicy(), generator_for(s)).prompts[0].shape
        for s in range(120)
    }
    assert shapes == set(SHAPES)
