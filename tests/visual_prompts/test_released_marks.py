"""Marks as the released generator draws them: supports and medians of 2,000 draws, and pixels.

The published weights were trained with these. Pictures have 336 pixels (s = 1) unless stated.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vipllava.keyed_random import generator_for
from vipllava.types import Point, Polygon, Region, Shape, Stroke, VisualPrompt
from vipllava.visual_prompts.geometry import contains, cubic_bezier
from vipllava.visual_prompts.policies import POLICIES, VisualPromptPolicy
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.sampling import sample_plan

DRAWS = 2000
SIZE = (336, 336)
BOX = Region((100.0, 120.0, 220.0, 200.0))  # 120 x 80
OCTAGON: Polygon = tuple(
    (160 + 60 * math.cos(k * math.pi / 4), 160 + 40 * math.sin(k * math.pi / 4)) for k in range(8)
)
MASKED = Region(BOX.bbox_xyxy, (OCTAGON,))


def marks(
    shape: Shape, region: Region = BOX, size: tuple[int, int] = SIZE, draws: int = DRAWS
) -> list[tuple[Stroke, ...]]:
    """Return the strokes of so many draws of one mark."""
    policy = VisualPromptPolicy(shapes=(shape,))
    return [
        sample_plan([region], size, policy, generator_for("released", n)).prompts[0].strokes
        for n in range(draws)
    ]


def painted(size: tuple[int, int], *strokes: Stroke) -> np.ndarray:
    """Return which pixels the strokes paint, [height, width]."""
    layer = Image.new("L", size)
    found = mark_opacity(VisualPrompt(0, "mask", (9, 9, 9), None, 255, strokes), size)
    assert found is not None
    layer.paste(*found)
    return np.asarray(layer) > 0


def tip_to_tail(strokes: tuple[Stroke, ...]) -> float:
    shaft = strokes[0].points
    return math.dist(shaft[0], shaft[-1])


def test_arrows_are_their_length_less_their_head() -> None:
    drawn = marks("arrow")
    lengths = [tip_to_tail(strokes) for strokes in drawn]
    low, median, high = np.quantile(lengths, [0.025, 0.5, 0.975])
    # As measured on the released code in as many draws; the median of 2,000 has a deviation of 0.2.
    assert median == pytest.approx(36.7, abs=0.7)
    assert (low, high) == (pytest.approx(27.5, abs=0.6), pytest.approx(48.1, abs=0.6))
    # 50 to 64 = 0.8 * 80 pixels, of which the head takes a fifth to a half.
    assert 25 <= min(lengths) < 26
    assert 50.2 < max(lengths) <= 51.2
    assert {strokes[0].width for strokes in drawn} == {1, 2, 3, 4, 5, 6}


def test_arrows_point_near_the_centre_from_any_side() -> None:
    tips, angles, heads, filled = [], [], [], 0
    for shaft, head in marks("arrow"):
        left, tip, right = map(np.array, head.points)
        assert shaft.points[0] == head.points[1]  # the head lies over the shaft
        back = np.array(shaft.points[-1]) - tip
        for barb in (left, right):
            size = float(np.linalg.norm(barb - tip))
            cosine = (barb - tip) @ back / (size * np.linalg.norm(back))
            assert math.degrees(math.acos(cosine)) == pytest.approx(60)
        heads.append(math.dist(*head.points[:2]))
        tips.append(tip - (160, 160))
        angles.append(math.atan2(back[1], back[0]))
        assert (head.kind, head.width) in (("polygon", 0), ("line", shaft.width))
        filled += head.kind == "polygon"
    reach = np.abs(tips)
    assert (reach.max(axis=0) <= (30, 20)).all()
    assert (reach.max(axis=0) > (29.5, 19.5)).all()
    assert np.median(reach, axis=0) == pytest.approx((15, 10), rel=0.06)
    assert 10 <= min(heads) < 10.5
    assert 31 < max(heads) <= 32
    assert np.median(heads) == pytest.approx(19.8, abs=0.4)
    assert np.histogram(angles, 8, (-math.pi, math.pi))[0].min() > 200
    assert 0.47 < filled / DRAWS < 0.53


@pytest.mark.parametrize(("side", "reach"), [(336, 5), (1000, 10), (335, 0)])
def test_half_of_the_shafts_are_bent_in_x_and_in_y(side: int, reach: int) -> None:
    shafts = [strokes[0].points for strokes in marks("arrow", size=(300, side))]
    bent = [np.array(shaft) for shaft in shafts if len(shaft) == 3]
    assert 0.47 < len(bent) / DRAWS < 0.53
    shifts = np.array([middle - (tip + tail) / 2 for tip, middle, tail in bent])
    if reach == 0:
        assert np.abs(shifts).max() < 1e-9
        return
    assert (shifts.min(axis=0) >= -reach).all()
    assert (shifts.max(axis=0) <= reach).all()
    assert (np.abs(shifts).max(axis=0) > 0.98 * reach).all()
    assert np.median(np.abs(shifts), axis=0) == pytest.approx([reach / 2] * 2, rel=0.1)
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.1


@pytest.mark.parametrize(("size", "least", "most"), [(SIZE, 6, 25), ((9, 1000), 17, 74)])
def test_the_head_has_a_least_size_and_the_shaft_one_that_is_seen(
    size: tuple[int, int], least: int, most: int
) -> None:
    tiny = Region((2.0, 100.0, 6.0, 104.0))
    drawn = marks("arrow", tiny, size)
    heads = [math.dist(*head.points[:2]) for _, head in drawn]
    assert min(heads) == pytest.approx(least)  # int(6 * s)
    assert max(heads) <= most
    shafts = [tip_to_tail(strokes) for strokes in drawn]
    assert min(shafts) == pytest.approx(4 * max(size) / 336)
    assert max(shafts) <= 0.8 * 2 * most


def test_big_boxes_reverse_the_bounds_of_an_arrows_length() -> None:
    big = Region((0.0, 0.0, 336.0, 300.0))
    lengths = [tip_to_tail(strokes) for strokes in marks("arrow", big)]
    assert 25 <= min(lengths) < 40
    assert 180 < max(lengths) <= 0.8 * 0.8 * 300


def test_a_points_semi_axes_are_multiplied_and_divided_by_its_aspect() -> None:
    radii, ratios, centres = Counter[int](), [], []
    for (stroke,) in marks("point", MASKED):
        (x1, y1), (x2, y2) = stroke.points
        rx, ry = (x2 - x1) / 2, (y2 - y1) / 2
        radius = math.sqrt(rx * ry)
        assert radius == pytest.approx(round(radius), abs=1e-6)
        radii[round(radius)] += 1
        ratios.append(ry / rx)
        centres.append((rx + x1, ry + y1))
    assert set(radii) == set(range(5, 21))
    assert min(radii.values()) > 80  # of 125
    assert 0.25 <= min(ratios) < 0.26
    assert 3.6 < max(ratios) <= 4
    others = [ratio for ratio in ratios if not math.isclose(ratio, 1)]
    assert 0.47 < len(others) / DRAWS < 0.53
    assert np.median(others) == pytest.approx(1 / 1.25**2, rel=0.06)  # a = U(0.5, 2)
    assert contains(OCTAGON, np.array(centres)).all()
    assert np.std(centres, axis=0) == pytest.approx((120 / 8, 80 / 8), rel=0.06)


def test_the_points_of_vcrs_published_figures_hardly_leave_the_centre() -> None:
    policy = POLICIES["evaluation"]["vcr"]
    found = []
    for region, draws in ((MASKED, DRAWS), (BOX, 200)):
        centres = []
        for n in range(draws):
            plan = sample_plan([region], SIZE, policy, generator_for("asked", n))
            (x1, y1), (x2, y2) = plan.prompts[0].strokes[0].points
            assert (x2 - x1, y2 - y1) == (pytest.approx(16), pytest.approx(16))
            centres.append(((x1 + x2) / 2, (y1 + y2) / 2))
        found.append(np.std(centres, axis=0))
    assert found[0] == pytest.approx((math.sqrt(120 / 8), math.sqrt(80 / 8)), rel=0.06)
    assert found[1] == pytest.approx(found[0], rel=0.2)
    # Ten draws outside of the mask, then the next one, wherever it lies.
    corner = Region(BOX.bbox_xyxy, (((100, 120), (220, 120), (100, 200)),))
    below = Region(BOX.bbox_xyxy, (((100, 120), (220, 120), (220, 125), (105, 125), (100, 200)),))
    for region in (corner, below):
        plan = sample_plan([region], SIZE, policy, generator_for("asked", 0))
        (x1, y1), (x2, y2) = plan.prompts[0].strokes[0].points
        assert abs((x1 + x2) / 2 - 160) < 5 * math.sqrt(15)
        assert abs((y1 + y2) / 2 - 160) < 5 * math.sqrt(10)


def test_a_contour_is_two_w_plus_one_pixels_wide() -> None:
    widths = Counter(strokes[0].width for strokes in marks("mask contour", MASKED))
    assert set(widths) == {3, 5}
    assert 940 < widths[3] < 1060
    assert {s[0].width for s in marks("mask contour", MASKED, (1000, 9), 200)} == {5, 7, 9, 11}


def test_a_contours_corners_are_square() -> None:
    ring: Polygon = ((20, 30), (60, 30), (60, 50), (20, 50))
    expected = np.zeros((100, 100), bool)
    expected[28:53, 18:63] = True
    expected[33:48, 23:58] = False
    assert (painted((100, 100), Stroke("contour", ring, 5)) == expected).all()
    dot = ((50.0, 60.0),) * 3
    assert painted((100, 100), Stroke("contour", dot, 5)).sum() == 25


@pytest.mark.parametrize("reach", [1, 2, 4, 9])
def test_a_contour_is_an_outline_at_every_place_of_a_square_brush(reach: int) -> None:
    star = [
        (
            150 + (90 if k % 2 else 35) * math.cos(0.4 + k * 0.45),
            140 + 80 * math.sin(0.4 + k * 0.45),
        )
        for k in range(14)
    ]
    beyond: list[Point] = [(250.5, 9.2), (300.0, 100.7), (280.0, 300.0), (250.5, 9.2)]
    for ring in (star, star[::-1], beyond):
        stamped = Image.new("L", (300, 280))
        pen = ImageDraw.Draw(stamped)
        for dx, dy in itertools.product(range(-reach, reach + 1), repeat=2):
            pen.polygon([(x + dx, y + dy) for x, y in ring], outline=255)
        ours = painted((300, 280), Stroke("contour", tuple(ring), 2 * reach + 1))
        assert (ours == (np.asarray(stamped) > 0)).all()


def test_scribbles_are_curves_of_four_points_of_the_region() -> None:
    for region in (BOX, MASKED):
        drawn = marks("scribble", region)
        assert {strokes[0].width for strokes in drawn} == set(range(2, 13))
        ends = np.array([strokes[0].points[0] for strokes in drawn])
        low, high = np.array(region.bbox_xyxy).reshape(2, 2)
        assert (ends >= low).all()
        assert (ends <= high).all()
        if region.polygons:
            assert contains(OCTAGON, ends).all()
        else:
            assert np.quantile(ends, [0.1, 0.5, 0.9], axis=0) == pytest.approx(
                np.array([(112, 128), (160, 160), (208, 192)]), abs=3.5
            )
        points = np.concatenate([strokes[0].points for strokes in drawn[:200]])
        assert (points >= low).all()
        assert (points <= high).all()


@pytest.mark.parametrize("width", [1, 5, 12])
def test_a_scribble_is_a_thousand_short_lines(width: int) -> None:
    control = [(40.5, 30.2), (290.0, 80.9), (10.1, 250.0), (300.7, 310.0)]
    t = np.linspace(0, 1, 1000)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1)
    expected = Image.new("L", SIZE)
    pen = ImageDraw.Draw(expected)
    for start, end in itertools.pairwise((basis @ np.array(control)).tolist()):
        pen.line([*start, *end], fill=255, width=width)
    stroke = Stroke("line", cubic_bezier(control, 1000), width)
    assert len(stroke.points) < 600
    assert (painted(SIZE, stroke) == (np.asarray(expected) > 0)).all()


def test_only_a_triangle_has_round_joints_and_none_where_it_closes() -> None:
    corners: list[Point] = [(20.0, 80.0), (50.0, 10.0), (80.0, 80.0)]
    for kind, points, joint in (
        ("polygon", [*corners, corners[0]], "curve"),
        ("line", corners, None),
    ):
        expected = Image.new("L", (100, 100))
        ImageDraw.Draw(expected).line(points, fill=255, width=9, joint=joint)
        found = painted((100, 100), Stroke(kind, tuple(corners), 9))  # type: ignore[arg-type]
        assert (found == (np.asarray(expected) > 0)).all()
