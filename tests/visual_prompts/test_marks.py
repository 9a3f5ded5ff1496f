"""Marks of a person: each shape at each place, one plan for the same marks, distinct words."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vipllava.types import RecordError, Shape, Stroke
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.marks import (
    MARKS,
    MOST_MARKS,
    Arrow,
    Ellipse,
    Mark,
    Mask,
    MaskContour,
    Point,
    Rectangle,
    Scribble,
    Triangle,
    plan_marks,
    refer_text,
)
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.shapes import PALETTE, prompt_words

SIZE = (320, 240)
BOX = (40.0, 60.0, 200.0, 180.0)
RING = ((40.0, 60.0), (200.0, 60.0), (120.0, 180.0))
DISC = np.hypot(*(np.indices((240, 320)) - np.array([120, 120])[:, None, None])) < 50
PLACES: dict[str, Any] = {
    "box": BOX,
    "polygon": RING,
    "rle": DISC,
    "point": (120.0, 90.0),
    "stroke": RING,
}
CASES = [(kind, place) for kind in MARKS.values() for place in kind.places]
NAMES = [f"{kind.shape}-{place}" for kind, place in CASES]


def pixels(marks: list[Mark], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return where marks change a black image, bool [height, width]."""
    image = Image.new("RGB", size)
    return np.asarray(render_plan(image, plan_marks(marks, size))).any(axis=2)


def test_there_is_a_class_for_every_shape():
    assert list(MARKS) == list(get_args(Shape))
    assert len(CASES) == 29


@pytest.mark.parametrize(("kind", "place"), CASES, ids=NAMES)
def test_a_shape_at_a_place(kind: type[Mark], place: str):
    mark = kind(**{place: PLACES[place]}, colour="red")
    plan = plan_marks([mark], SIZE)
    (prompt,) = plan.prompts
    assert (prompt.region, prompt.shape, prompt.rgb, prompt.alpha) == (
        0,
        kind.shape,
        (255, 0, 0),
        128,
    )
    assert prompt_words(prompt).endswith(f"the red {kind.shape}")
    assert plan_marks([kind(**{place: PLACES[place]}, colour="red")], SIZE) == plan
    touched = pixels([mark])
    rows, columns = np.nonzero(touched)
    assert len(rows) >= 60
    # Where it was put: arrows come from elsewhere.
    if kind is not Arrow:
        assert columns.min() >= 0 and columns.max() <= 250  # noqa: PT018
        assert rows.min() >= 20
    assert hash(mark) == hash(replace(mark))


@pytest.mark.parametrize(("kind", "place"), CASES, ids=NAMES)
def test_the_image_is_that_of_the_training_renderer(kind: type[Mark], place: str):
    mark = kind(**{place: PLACES[place]})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8))
    before = photo.tobytes()
    overlay = render_plan(photo, plan_marks([mark], SIZE))
    assert photo.tobytes() == before
    touched = pixels([mark])
    changed = np.any(np.asarray(overlay) != np.asarray(photo), axis=2)
    assert not np.any(changed & ~touched)


COORDINATE = st.floats(-60, 160) | st.integers(-60, 160)
POINT = st.tuples(COORDINATE, COORDINATE)


@st.composite
def any_mark(draw: st.DrawFn) -> Mark:
    kind = draw(st.sampled_from(list(MARKS.values())))
    place = draw(st.sampled_from(kind.places))
    value: Any
    if place == "box":
        value = draw(st.tuples(*[COORDINATE] * 4))
    elif place == "point":
        value = draw(POINT)
    elif place == "stroke":
        least = 3 if kind is Triangle else 2
        value = draw(st.lists(POINT, min_size=least, max_size=3))
    elif place == "polygon":
        value = draw(st.lists(st.lists(POINT, min_size=3, max_size=5), min_size=1, max_size=2))
    else:
        value = np.zeros((80, 100), bool)
        for x, y in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 79)), max_size=4)):
            value[y, x:] = True
    width = draw(st.none() | st.integers(1, 12) | st.just(10_000))
    return kind(**{place: value}, width=width, seed=draw(st.integers(0, 9)))


@settings(max_examples=300)
@given(st.data())
def test_any_place_is_drawn_or_refused_by_name(data: st.DataObject):
    plan = refused = None
    try:
        plan = plan_marks([data.draw(any_mark())], (100, 80))
    except MarkError as error:
        refused = error
    assert (plan is None) != (refused is None)
    if plan is not None:
        assert np.asarray(render_plan(Image.new("RGB", (100, 80)), plan)).any()


SPECKS: list[tuple[str, Any]] = [
    ("box", (99.8, 10, 100, 20)),
    ("box", (0, 0, 1e-9, 1e-9)),
    ("box", (99.99, 79.99, 1000, 1000)),
    ("polygon", ((99.7, 10), (100, 10), (100, 20))),
    ("polygon", ((10, 79.9), (20, 80), (15, 80))),
    ("polygon", ((5, 5), (5, 5), (5, 5))),
    ("point", (99.9999, 79.9999)),
    ("stroke", ((98, 78), (300, 400), (90, 400))),
]


@pytest.mark.parametrize("kind", MARKS.values(), ids=MARKS)
@pytest.mark.parametrize(("place", "value"), SPECKS)
@pytest.mark.parametrize("width", [None, 1, 12])
def test_a_speck_at_the_edge_is_still_painted(
    kind: type[Mark], place: str, value: Any, width: int | None
):
    if place in kind.places and not (kind is Arrow and place == "stroke"):
        assert pixels([kind(**{place: value}, width=width)], (100, 80)).any()


def test_what_reaches_out_is_cut_off():
    for kind in (Rectangle, Mask, MaskContour):
        assert plan_marks([kind((-50, 60, 9999, 180))], SIZE) == plan_marks(
            [kind((0, 60, 320, 180))], SIZE
        )
    ring = ((-50, 60), (200, 60), (120, 500))
    inside = ((0, 60), (200, 60), (120, 240))
    assert plan_marks([Mask(polygon=ring)], SIZE) == plan_marks([Mask(polygon=inside)], SIZE)
    # The end of a line out of the picture stays there: at the edge it would be another line.
    (prompt,) = plan_marks([Scribble(stroke=((-40, 0), (60, 50)))], SIZE).prompts
    assert prompt.strokes == (Stroke("line", ((-40.0, 0.0), (60.0, 50.0)), 3),)
    (prompt,) = plan_marks([Scribble(stroke=((-1e7, 0), (60, 50)))], SIZE).prompts
    assert prompt.strokes[0].points[0] == (-320.0, 0.0)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (Rectangle((320, 0, 400, 50)), "box is (320.0, 0.0, 400.0, 50.0); expected a box with a "),
        (Rectangle((-9, -9, 0, 0)), "a box with a part inside the image of 320 x 240 pixels"),
        (Point((320, 10)), "point is (320.0, 10.0); expected a point inside the image of 320"),
        (Point((10, -0.1)), "point is (10.0, -0.1); expected"),
        (Mask(polygon=((400, 0), (500, 0), (500, 9))), "polygon is ((400.0, 0.0), (500.0, 0.0)"),
        (Mask(rle=np.ones((4, 5), bool)), "rle.size is [4, 5]; expected [240, 320], height and w"),
        (Mask(rle=np.zeros((240, 320), bool)), "rle is a mask without a pixel; expected a mask"),
        (Scribble(stroke=((-9, 5), (5, -9))), "expected a point at least inside the image of 320"),
        (Arrow(stroke=((5, 5), (-9, 5))), "an arrow's tail to its tip, which is inside the image"),
        (Arrow(stroke=((5, 5), (5, 5))), "stroke is ((5.0, 5.0), (5.0, 5.0)); expected points fr"),
        (Triangle(stroke=((5, 5), (5, 9))), "expected three corners, not 2 points"),
    ],
)
def test_what_lies_elsewhere_is_refused_with_its_number(mark: Mark, message: str):
    with pytest.raises(MarkError, match=re.escape(message)) as caught:
        plan_marks([Rectangle(BOX), mark], SIZE)
    assert caught.value.field.startswith("regions[1].")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "box is None; expected exactly one of box, polygon, rle for a rectangle"),
        ({"box": BOX, "polygon": RING}, "box, polygon is [(40.0, 60.0, 200.0, 180.0), ((40.0, "),
        ({"point": (1, 2)}, "point is (1, 2); expected one of box, polygon, rle for a rectangle"),
        ({"box": (1, 2, 3)}, "box is (1, 2, 3); expected four finite numbers x1, y1, x2, y2"),
        ({"box": (5, 2, 3, 9)}, "box is (5, 2, 3, 9); expected four finite numbers x1, y1, x2"),
        ({"box": (1, 2, 1, 9)}, "x1 < x2 and y1 < y2"),
        ({"box": (1, 2, math.nan, 9)}, "box is (1, 2, nan, 9)"),
        ({"box": (1, 2, math.inf, 9)}, "box is (1, 2, inf, 9)"),
        ({"box": (1, 2, 10**300, 9)}, "box is (1, 2, 1000000"),
        ({"box": (1, 2, 10**5000, 9)}, "box is a number of thousands of digits; expected four"),
        ({"box": (False, 2, 3, 9)}, "box is (False, 2, 3, 9)"),
        ({"box": (np.bool_(False), 2, 3, 9)}, "box is (np.False_, 2, 3, 9)"),
        ({"box": ("1", 2, 3, 9)}, "box is ('1', 2, 3, 9)"),
        ({"box": (1j, 2, 3, 9)}, "box is (1j, 2, 3, 9)"),
        ({"box": np.float64(3)}, "box is np.float64(3.0); expected four"),
        ({"box": np.ones((2, 2))}, "box is array([[1., 1.]"),
        ({"polygon": ((1, 2), (3, 4))}, "polygon is a list of 2; expected 3 to 20000 points [x, y"),
        ({"polygon": ()}, "polygon is a list of 0; expected 3 to 20000 points"),
        ({"polygon": (RING, 7)}, "polygon is 7; expected 3 to 20000 points"),
        ({"polygon": (RING, ((1, 2), (3, 4), (5,)))}, "polygon is (5,); expected 3 to 20000"),
        ({"polygon": ((1, 2),) * 20_001}, "polygon is a list of 20001; expected 3 to 20000"),
        ({"polygon": (RING,) * 7000}, "polygon is a list of 21000 points; expected at most 20000"),
        ({"box": BOX, "colour": "rde"}, "colour is 'rde'; expected one of red, lime, blue"),
        ({"box": BOX, "colour": (1, 2)}, "colour is (1, 2); expected one of red, lime"),
        ({"box": BOX, "colour": (1, 2, 256)}, "colour is (1, 2, 256); expected"),
        ({"box": BOX, "colour": (1, 2, True)}, "colour is (1, 2, True); expected"),
        ({"box": BOX, "colour": (1, 2, 0.5)}, "colour is (1, 2, 0.5); expected"),
        ({"box": BOX, "colour": "#12345"}, "colour is '#12345'; expected one of"),
        ({"box": BOX, "width": 0}, "width is 0; expected a whole number from 1 to 10000"),
        ({"box": BOX, "width": True}, "width is True; expected a whole number from 1 to 10000"),
        ({"box": BOX, "alpha": 256}, "alpha is 256; expected a whole number from 1 to 255"),
        ({"box": BOX, "seed": None}, "seed is None; expected a whole number from 0 to"),
        ({"box": BOX, "seed": 2**63}, "seed is 9223372036854775808; expected a whole number"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(MarkError, match=re.escape(message)):
        Rectangle(**fields)


def test_numbers_of_arrays_are_numbers():
    expected = Rectangle((1.0, 2.0, 3.0, 9.0), colour=(1, 2, 3), width=4)
    for box in (
        [1, 2, 3, 9],
        np.array([1, 2, 3, 9]),
        np.array([1, 2, 3, 9], np.float16),
        (np.int64(1), np.float32(2), Fraction(3), Decimal(9)),
    ):
        look = {"colour": np.array([1, 2, 3], np.uint8), "width": np.int32(4)}
        assert Rectangle(box, **look) == expected  # pyright: ignore[reportArgumentType]
    assert type(Rectangle(BOX, width=np.int32(4)).width) is int  # pyright: ignore
    rings = (np.array(RING), np.array(RING))
    assert Mask(polygon=rings) == Mask(polygon=(RING, RING))  # pyright: ignore
    assert Mask(polygon=np.array(RING)) == Mask(polygon=(RING,))  # pyright: ignore


def test_at_most_a_hundred_marks_and_so_many_points():
    assert len(plan_marks([Rectangle(BOX)] * MOST_MARKS, SIZE).prompts) == 100
    with pytest.raises(MarkError, match="regions is 101; expected at most 100 marks on one image"):
        plan_marks([Rectangle(BOX)] * (MOST_MARKS + 1), SIZE)
    line = [(float(x % 320), float(x % 240)) for x in range(20_000)]
    with pytest.raises(
        MarkError, match=r"regions\[20\] is 420000 points, with the marks before it"
    ):
        plan_marks([Scribble(stroke=line)] * 21, SIZE)  # pyright: ignore[reportArgumentType]


def test_another_mark_moves_nothing():
    marks = [kind(**{place: PLACES[place]}) for kind, place in CASES]
    together = plan_marks(marks, SIZE).prompts
    for index, mark in enumerate(marks):
        (alone,) = plan_marks([mark], SIZE).prompts
        assert together[index].strokes == alone.strokes
        assert together[index].region == index


def test_the_seed_moves_what_is_drawn_from_chance_and_nothing_else():
    for kind, place in CASES:
        drawn = {plan_marks([kind(**{place: PLACES[place]}, seed=seed)], SIZE) for seed in range(3)}
        by_chance = place != "stroke" and kind not in (Rectangle, Mask, MaskContour)
        by_chance = by_chance and (kind, place) != (Point, "point")
        assert len(drawn) == (3 if by_chance else 1), (kind, place)


def test_the_look_left_open_follows_the_size_of_the_image():
    def width(mark: Mark, size: tuple[int, int]) -> int:
        (prompt,) = plan_marks([mark], size).prompts
        return prompt.strokes[0].width

    for size, expected in (((100, 80), 3), ((336, 336), 3), ((672, 300), 6), ((300, 3360), 30)):
        assert width(Rectangle((1, 1, 50, 50)), size) == expected
        assert width(Arrow((1, 1, 50, 50)), size) == expected
        assert width(MaskContour((1, 1, 50, 50)), size) == 2 * max(1, round(expected / 3)) + 1
    assert width(Rectangle((1, 1, 50, 50), width=1), (3000, 3000)) == 1
    (prompt,) = plan_marks([Point((50, 40), width=7, alpha=9)], (100, 80)).prompts
    assert prompt.strokes == (Stroke("ellipse", ((43.0, 33.0), (57.0, 47.0))),)
    assert prompt.alpha == 9


def test_a_mask_with_a_hole_is_painted_and_outlined_as_it_is():
    ring = DISC.copy()
    ring[100:140, 100:140] = False
    assert np.array_equal(pixels([Mask(rle=ring)]), ring)
    image = Image.new("L", SIZE)
    canvas = ImageDraw.Draw(image)
    for y, x in np.argwhere(ring & ~_eroded(ring)):
        canvas.rectangle((x - 1, y - 1, x + 1, y + 1), fill=1)  # the brush of width 1
    assert np.array_equal(pixels([MaskContour(rle=ring, width=1)]), np.asarray(image) > 0)


def test_nothing_is_put_into_a_hole():
    ring = DISC.copy()
    ring[90:151, 90:151] = False
    for kind in (Point, Triangle, Scribble, Arrow):
        for seed in range(20):
            (prompt,) = plan_marks([kind(rle=ring, seed=seed)], SIZE).prompts
            points = prompt.strokes[0].points
            if kind is Point:
                points = (tuple(np.mean(points, axis=0)),)
            elif kind is not Triangle:
                points = points[:1]
            assert all(ring[int(y), int(x)] for x, y in points)


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    near = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.all(near, axis=0)


def test_what_lies_in_a_region_lies_in_its_largest_piece():
    mask = np.zeros((240, 320), bool)
    mask[5:8, 5:8] = mask[100:200, 150:300] = True
    for kind in (Point, Triangle, Scribble):
        for seed in range(5):
            (prompt,) = plan_marks([kind(rle=mask, seed=seed)], SIZE).prompts
            (stroke,) = prompt.strokes
            points = np.array(stroke.points)
            x, y = points.mean(axis=0)
            assert 149 <= x <= 300
            assert 99 <= y <= 200
    for kind in (Rectangle, Ellipse):
        (prompt,) = plan_marks([kind(rle=mask)], SIZE).prompts
        assert prompt.strokes[0].points[0][0] <= 5


def test_an_arrow_by_hand_points_where_the_hand_went():
    # The last two points are one pixel apart and say "down".
    hand = [(20.0, 100.0), (60.0, 100.0), (119.0, 100.0), (120.0, 100.0), (120.0, 101.0)]
    (prompt,) = plan_marks([Arrow(stroke=hand)], SIZE).prompts  # pyright: ignore
    shaft, head = prompt.strokes
    assert shaft == Stroke("line", tuple(hand), 3)
    (left, tip, right) = head.points
    assert tip == (120.0, 101.0)
    assert left[0] < 115 and right[0] < 115  # noqa: PT018
    assert abs(left[1] - 101) > 10 and abs(right[1] - 101) > 10  # noqa: PT018
    assert math.dist(left, tip) == pytest.approx(0.35 * 50 * 320 / 336)  # of the longest drawn


def test_an_arrow_at_a_point_ends_there_and_is_long_enough_to_be_seen():
    for point in ((120.0, 90.0), (0.0, 0.0), (319.5, 239.5)):
        for seed in range(5):
            (prompt,) = plan_marks([Arrow(point=point, seed=seed)], SIZE).prompts
            tail, tip = prompt.strokes[0].points
            assert tip == point
            assert math.dist(tail, tip) == pytest.approx(50 * 320 / 336)
            assert 0 <= tail[0] < 320
            assert 0 <= tail[1] < 240


def test_colours_left_open_are_distinct_by_shape():
    marks = [Rectangle(BOX), Rectangle(BOX, colour="red"), Ellipse(BOX), Rectangle(BOX)]
    names = [prompt.colour_name for prompt in plan_marks(marks, SIZE).prompts]
    assert names == ["lime", "red", "red", "blue"]
    many = plan_marks([Rectangle(BOX)] * 11, SIZE).prompts
    assert [prompt.colour_name for prompt in many] == [*PALETTE, "red", "red"]
    (named, plain) = plan_marks(
        [Rectangle(BOX, colour="red"), Rectangle(BOX, colour="#ff0000")], SIZE
    ).prompts
    assert (named.rgb, named.colour_name) == ((255, 0, 0), "red")
    assert (plain.rgb, plain.colour_name) == ((255, 0, 0), None)


def test_texts_say_the_words():
    plan = plan_marks([Rectangle(BOX), Arrow(BOX, colour=(1, 2, 3))], SIZE)
    assert refer_text("{0}, {1}, {{0}}, {}, {a}, {{1}} {0}", plan) == (
        "within the red rectangle, pointed to by the arrow, {0}, {}, {a}, {1} "
        "within the red rectangle"
    )
    assert refer_text("{{0}} {}", plan_marks([], SIZE)) == "{0} {}"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "nothing is marked: give its region, or write {{2}} for these letters themselves"),
        (1, "the only mark is {0}: say that one, or write {{2}} for these letters themselves"),
        (2, "the marks are {0} to {1}: say one of them, or write {{2}} for these letters"),
    ],
)
def test_a_text_mentions_only_marks_that_are_there(count: int, said: str):
    plan = plan_marks([Rectangle(BOX)] * count, SIZE)
    with pytest.raises(RecordError) as caught:
        refer_text("What is {2}?", plan)
    assert str(caught.value).startswith(f"the text mentions {{2}}, and {said}")


def test_marks_of_the_same_words_can_be_drawn_but_not_said():
    plan = plan_marks([Mask(BOX, colour="red")] * 2 + [Mask(BOX)], SIZE)
    assert refer_text("What is {2}?", plan) == "What is with the lime mask?"
    with pytest.raises(
        RecordError, match=r"`with the red mask` name marks \[0, 1\]; give one of"
    ) as e:
        refer_text("What is {1}?", plan)
    assert e.value.fault == "same-words"
