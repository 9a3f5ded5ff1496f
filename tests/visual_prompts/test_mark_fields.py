"""Marks as JSON: what is read, what is refused and by which name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vipllava.visual_prompts.mark_fields import (
    PlacedMark,
    mark_to_fields,
    parse_marks,
    parse_placed_marks,
)
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
)

BOX = [10, 20, 60, 80]


def test_the_words_of_every_field():
    text = """[
        {"shape": "rectangle", "box": [10, 20, 60.5, 80], "colour": "red", "width": 4},
        {"shape": "ellipse", "polygon": [[1, 2], [30, 2], [30, 40]], "color": [1, 2, 3]},
        {"shape": "mask", "polygon": [[[1, 2], [30, 2], [30, 40]], [[5, 5], [9, 5], [9, 9]]]},
        {"shape": "mask contour", "rle": {"size": [3, 4], "counts": [5, 2, 5]}, "alpha": 200},
        {"shape": "point", "point": [5, 6], "colour": "#00fF10"},
        {"shape": "triangle", "box": [10, 20, 60, 80], "seed": 7},
        {"shape": "arrow", "stroke": [[1, 1], [20, 30]], "colour": null, "width": null},
        {"shape": "scribble", "stroke": [[1, 1], [20, 30]], "box": null, "seed": null}
    ]"""
    outer, inner = ((1.0, 2.0), (30.0, 2.0), (30.0, 40.0)), ((5.0, 5.0), (9.0, 5.0), (9.0, 9.0))
    assert parse_marks(json.loads(text)) == [
        Rectangle((10.0, 20.0, 60.5, 80.0), colour="red", width=4),
        Ellipse(polygon=(outer,), colour=(1, 2, 3)),
        Mask(polygon=(outer, inner)),
        MaskContour(rle={"size": (3, 4), "counts": (5, 2, 5)}, alpha=200),
        Point((5.0, 6.0), colour=(0, 255, 16)),
        Triangle((10.0, 20.0, 60.0, 80.0), seed=7),
        Arrow(stroke=((1.0, 1.0), (20.0, 30.0))),
        Scribble(stroke=((1.0, 1.0), (20.0, 30.0))),
    ]
    assert parse_marks([]) == []


def test_pictures_are_told_apart_by_number():
    value = [{"shape": "mask", "box": BOX}, {"shape": "mask", "box": BOX, "image": 1}]
    mark = Mask((10.0, 20.0, 60.0, 80.0))
    assert parse_placed_marks(value, num_images=2) == [PlacedMark(mark, 0), PlacedMark(mark, 1)]
    for number, expected in ((2, "a number from 0 to 1: there are 2"), (-1, ""), (True, "")):
        value[1]["image"] = number
        with pytest.raises(
            MarkError, match=rf"regions\[1\]\.image is {number}; expected {expected}"
        ):
            parse_placed_marks(value, num_images=2)
    with pytest.raises(MarkError, match=r"regions\[1\]\.image is 1; expected 0"):
        parse_marks([value[0], value[0] | {"image": 1}])
    with pytest.raises(MarkError, match=r"regions\[0\]\.image is 0; .* no picture is there"):
        parse_placed_marks(value, num_images=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "regions is None; expected a list of objects"),
        ({"shape": "mask"}, "regions is {'shape': 'mask'}; expected a list of objects"),
        ([[1]], "regions[0] is [1]; expected an object of shape, box, polygon"),
        ([{}], "regions[0].shape is None; expected one of rectangle, ellipse, point"),
        ([{"shape": "circle", "box": BOX}], "regions[0].shape is 'circle'; expected one of rec"),
        ([{"shape": ["mask"]}], "regions[0].shape is ['mask']; expected one of"),
        ([{"shape": "mask", "bbox": BOX}], "regions[0].bbox is [10, 20, 60, 80]; expected no suc"),
        ([{"shape": "mask", "bbox": BOX}], "no such field, but `box`, perhaps"),
        ([{"shape": "mask", "qqq": 1}], "no such field, but one of shape, box, polygon, rle"),
        ([{"shape": "mask", "q" * 99: 1}], "regions[0].a field is 1; expected no such field"),
        ([{"shape": "mask", 3: 1}], "regions[0].a field is 1; expected no such field"),
        ([{"shape": "mask"}], "regions[0].box is None; expected exactly one of box, polygon, rle"),
        ([{"shape": "mask", "box": BOX, "rle": 1}], "regions[0].box, rle is"),
        ([{"shape": "mask", "point": [1, 2]}], "regions[0].point is [1, 2]; expected one of box"),
        ([{"shape": "mask", "box": "10,20,60,80"}], "regions[0].box is '10,20,60,80'; expected fo"),
        ([{"shape": "mask", "box": [1, 2, 3, float("nan")]}], "regions[0].box is [1, 2, 3, nan]"),
        ([{"shape": "mask", "box": [1, 2, 3, True]}], "regions[0].box is [1, 2, 3, True]; exp"),
        ([{"shape": "mask", "box": [1, 2, 3, 10**400]}], "regions[0].box is [1, 2, 3, 100"),
        ([{"shape": "mask", "box": BOX, "color": "re"}], "regions[0].colour is 're'; expected one"),
        ([{"shape": "mask", "box": BOX, "color": 1, "colour": 1}], "regions[0].color is 1; expec"),
        ([{"shape": "mask", "box": BOX, "width": 2.5}], "regions[0].width is 2.5; expected a who"),
        ([{"shape": "mask", "box": BOX, "alpha": 0}], "regions[0].alpha is 0; expected a whole n"),
        ([{"shape": "mask", "box": BOX, "seed": -1}], "regions[0].seed is -1; expected a whole n"),
        ([{"shape": "mask", "rle": {"size": [1, 1], "counts": "x"}}], "regions[0].rle.counts is"),
    ],
)
def test_what_means_nothing_is_refused_by_name(value: object, message: str):
    with pytest.raises(MarkError, match=re.escape(message)):
        parse_marks(value)


def test_too_many_are_refused_before_any_is_read():
    with pytest.raises(MarkError, match="regions is a list of 101; expected at most 100 marks"):
        parse_marks([None] * (MOST_MARKS + 1))
    with pytest.raises(MarkError, match=r"body\.regions\[0\] is None"):
        parse_marks([None], "body.regions")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
PLAUSIBLE = st.integers(-40, 140) | st.floats(-40, 140) | st.just(10**300)
LISTS = st.lists(PLAUSIBLE, max_size=5) | st.lists(st.lists(PLAUSIBLE, max_size=3), max_size=5)
FIELDS = st.fixed_dictionaries(
    {"shape": st.sampled_from(list(MARKS)) | JSON},
    optional={
        name: LISTS | JSON
        for name in ("box", "polygon", "rle", "point", "stroke", "colour", "color", "width",
                     "alpha", "seed", "image", "bbox")
    },
)  # fmt: skip


@given(JSON | st.lists(FIELDS | JSON, max_size=4))
def test_any_json_is_marks_or_a_mark_error(value: object):
    marks: list[Mark] = []
    fault = None
    try:
        marks = parse_marks(value)
        plan_marks(marks, (100, 80))
    except MarkError as error:
        fault = error
    assert fault is None or fault.field.startswith("regions")
    assert parse_marks(json.loads(json.dumps(list(map(mark_to_fields, marks))))) == marks


ONE_PLACE: dict[str, Any] = {
    "box": BOX,
    "polygon": [[1, 2], [30, 2], [30, 40]],
    "rle": {"size": [3, 4], "counts": "525"},
    "point": [3, 4],
    "stroke": [[1, 1], [20, 30], [40, 9]],
}


@pytest.mark.parametrize("shape", MARKS)
def test_marks_and_their_fields_are_inverse(shape: str):
    for place in MARKS[shape].places:  # pyright: ignore[reportArgumentType]
        for look in ({}, {"colour": "red"}, {"colour": [1, 2, 3], "width": 2, "seed": 3}):
            fields = {"shape": shape, place: ONE_PLACE[place], **look}
            (placed,) = parse_placed_marks([fields | {"image": 1}], num_images=2)
            again = json.loads(json.dumps(mark_to_fields(*placed)))
            assert parse_placed_marks([again], num_images=2) == [placed]
            assert set(again) == {*fields, "image"}
