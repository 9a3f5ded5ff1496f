"""Marks from options and from commands: literal tables, and errors that name what was typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vipllava.serve.terminal.options import describe, mark_of_words, marks_of_options
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.marks import (
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
from vipllava.visual_prompts.shapes import SHAPES

BOX = (10.0, 20.0, 30.0, 40.0)
RING = ((1.0, 2.0), (30.0, 4.0), (5.0, 60.0))
RLE = {"size": [4, 4], "counts": [0, 4, 12]}


def options(line: str) -> list[tuple[str, str]]:
    """``box 1,2,3,4 shape ellipse`` as pairs."""
    words = line.split()
    return list(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("line", "marks"),
    [
        ("box 10,20,30,40", [Rectangle(BOX)]),
        ("point 5,6.5", [Point((5.0, 6.5))]),
        ("polygon 1,2,30,4,5,60", [Mask(polygon=(RING,))]),
        ("polygon 1,2,30,4,5,60;1,2,30,4,5,60", [Mask(polygon=(RING, RING))]),
        ("stroke 1,2,30,4,5,60", [Scribble(stroke=RING)]),
        ("box 10,20,30,40 shape rectangle", [Rectangle(BOX)]),
        ("box 10,20,30,40 shape ellipse", [Ellipse(BOX)]),
        ("box 10,20,30,40 shape point", [Point(box=BOX)]),
        ("box 10,20,30,40 shape triangle", [Triangle(BOX)]),
        ("box 10,20,30,40 shape mask", [Mask(BOX)]),
        ("box 10,20,30,40 shape mask-contour", [MaskContour(BOX)]),
        ("box 10,20,30,40 shape Mask_Contour", [MaskContour(BOX)]),
        ("box 10,20,30,40 shape arrow", [Arrow(BOX)]),
        ("box 10,20,30,40 shape scribble", [Scribble(BOX)]),
        ("stroke 1,2,30,4,5,60 shape triangle", [Triangle(stroke=RING)]),
        ("stroke 1,2,30,4,5,60 shape arrow", [Arrow(stroke=RING)]),
        ("point 5,6 shape arrow", [Arrow(point=(5.0, 6.0))]),
        (
            "box 100,200,200,300 shape ellipse colour blue alpha 128 width 3",
            [Ellipse((100.0, 200.0, 200.0, 300.0), colour="blue", alpha=128, width=3)],
        ),
        ("box 10,20,30,40 colour 255,0,128", [Rectangle(BOX, colour=(255, 0, 128))]),
        ("box 10,20,30,40 colour #ff0080", [Rectangle(BOX, colour=(255, 0, 128))]),
        ("box 10,20,30,40 colour Red", [Rectangle(BOX, colour="red")]),
        ("box -10,2e1,30,40", [Rectangle((-10.0, 20.0, 30.0, 40.0))]),
        # Behind a place an option is for that mark alone ...
        (
            "box 10,20,30,40 colour red point 5,6 box 10,20,30,40 shape ellipse colour blue",
            [Rectangle(BOX, colour="red"), Point((5.0, 6.0)), Ellipse(BOX, colour="blue")],
        ),
        # ... in front of the first place for all, unless a mark says otherwise.
        (
            "width 5 colour red box 10,20,30,40 point 5,6 colour blue",
            [Rectangle(BOX, colour="red", width=5), Point((5.0, 6.0), colour="blue", width=5)],
        ),
        # The order of places is that of the marks' numbers, whatever their kinds.
        (
            "point 5,6 box 10,20,30,40 point 7,8",
            [Point((5.0, 6.0)), Rectangle(BOX), Point((7.0, 8.0))],
        ),
        ("", []),
    ],
)
def test_options_are_marks(line: str, marks: list[Mark]):
    assert marks_of_options(options(line)) == marks


def test_all_eight_shapes_can_be_asked_for():
    made = [
        marks_of_options([("box", "10,20,30,40"), ("shape", shape)])[0].shape for shape in SHAPES
    ]
    assert made == list(SHAPES)
    assert len(made) == 8


def test_a_mask_in_run_lengths_is_a_file(tmp_path: Path):
    path = tmp_path / "a mask.json"
    path.write_text(json.dumps(RLE))
    (mark,) = marks_of_options([("rle", str(path)), ("colour", "aqua")])
    assert mark == Mask(rle=RLE, colour="aqua")
    assert mark_of_words("rle", f"'{path}' mask contour") == MaskContour(rle=RLE)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("box 1,2,3", "--box 1,2,3: expected four finite numbers x1, y1, x2, y2"),
        ("box 1,2,3,x", "--box 1,2,3,x: expected x1,y1,x2,y2 in pixels"),
        ("box 1,2,nan,4", "--box 1,2,nan,4: expected four finite numbers"),
        ("box 30,2,10,4", "--box 30,2,10,4: expected four finite numbers"),
        ("box 1,2,3,4;5,6,7,8", "--box 1,2,3,4;5,6,7,8: expected x1,y1,x2,y2 in pixels"),
        ("point 1,2,3", "--point 1,2,3: expected two finite numbers"),
        ("polygon 1,2,3,4", "--polygon 1,2,3,4: expected 3 to 20000 points"),
        ("polygon 1,2,3,4,5", "--polygon 1,2,3,4,5: expected x,y,x,y,... in pixels, three"),
        ("stroke 1,2", "--stroke 1,2: expected 2 to 20000 points"),
        ("stroke 1,2,3", "--stroke 1,2,3: expected x,y,x,y,... in pixels, two"),
        ("rle nowhere.json", "--rle nowhere.json: expected a file with a mask in COCO's run"),
        ("box 1,2,3,4 shape elipse", "--shape elipse: expected one of rectangle, ellipse, point"),
        ("box 1,2,3,4 colour pink", "--colour pink: expected one of red, lime, blue"),
        ("box 1,2,3,4 colour 256,0,0", "--colour 256,0,0: expected one of red"),
        ("box 1,2,3,4 colour 1,2", "--colour 1,2: expected one of red"),
        ("box 1,2,3,4 width 2.5", "--width 2.5: expected a whole number"),
        ("box 1,2,3,4 width 0", "--width 0: expected a whole number from 1 to 10000"),
        ("box 1,2,3,4 alpha 256", "--alpha 256: expected a whole number from 1 to 255"),
        ("point 1,2 shape rectangle", "--point 1,2: expected one of box, polygon, rle for a rect"),
        ("stroke 1,2,3,4 shape mask", "--stroke 1,2,3,4: expected one of box, polygon, rle for a"),
        (
            "box 1,2,3,4 colour red colour blue",
            "--colour red and --colour blue are both for --box 1,2,3,4",
        ),
        ("width 3 width 4 box 1,2,3,4", "--width 3 and --width 4 are both for all marks"),
        ("shape ellipse", "--shape ellipse is for no mark: say where, e.g. --box x1,y1,x2,y2"),
    ],
)
def test_wrong_options_are_named(line: str, said: str):
    with pytest.raises(VipLlavaError) as caught:
        marks_of_options(options(line))
    assert said in str(caught.value)


def test_a_mask_that_is_no_json_is_named(tmp_path: Path):
    path = tmp_path / "mask.json"
    path.write_text("{")
    with pytest.raises(VipLlavaError, match="it is no JSON"):
        marks_of_options([("rle", str(path))])


@pytest.mark.parametrize(
    ("place", "words", "mark"),
    [
        ("box", "10,20,30,40", Rectangle(BOX)),
        ("box", "10, 20, 30, 40 ellipse blue", Ellipse(BOX, colour="blue")),
        ("box", "10 20 30 40 blue ellipse", Ellipse(BOX, colour="blue")),
        ("box", "10,20,30,40 mask contour", MaskContour(BOX)),
        ("box", "10,20,30,40 mask", Mask(BOX)),
        ("box", "10,20,30,40 mask-contour #010203", MaskContour(BOX, colour=(1, 2, 3))),
        (
            "box",
            "10,20,30,40 shape=arrow color=1,2,3 width=4 alpha=5 seed=6",
            Arrow(BOX, colour=(1, 2, 3), width=4, alpha=5, seed=6),
        ),
        ("point", "5,6 gold", Point((5.0, 6.0), colour="gold")),
        ("polygon", "1,2 30,4 5,60", Mask(polygon=(RING,))),
        ("stroke", "1,2,30,4,5,60 arrow", Arrow(stroke=RING)),
    ],
)
def test_commands_are_marks(place: str, words: str, mark: Mark):
    assert mark_of_words(place, words) == mark


@pytest.mark.parametrize(
    ("place", "words", "said"),
    [
        ("box", "", "/box: expected x1,y1,x2,y2 in pixels"),
        ("box", "1,2,3", "/box 1,2,3: box is [1.0, 2.0, 3.0]; expected four"),
        ("box", "1,2,3,4 elipse", "`elipse` is no shape and no colour (did you mean ellipse?)"),
        ("box", "1,2,3,4 red blue", "`red` and `blue`: a mark has one colour"),
        ("box", "1,2,3,4 size=3", "`size=3`: expected one of shape, colour, width, alpha, seed"),
        ("box", "1,2,3,4 alpha=x", "alpha is 'x'; expected a whole number"),
        ("rle", "", "/rle: expected the file of a mask, JSON"),
        ("rle", "'a", "/rle 'a: No closing quotation"),
    ],
)
def test_wrong_words_are_named(place: str, words: str, said: str):
    with pytest.raises(VipLlavaError) as caught:
        mark_of_words(place, words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("mark", "line"),
    [
        (Rectangle(BOX, width=3), "rectangle, box 10,20,30,40, width 3"),
        (Point((1.5, 2.0), alpha=9), "point, point 1.5,2, alpha 9"),
        (Mask(polygon=(RING, RING)), "mask, polygon of 6 points"),
        (Arrow(stroke=RING), "arrow, stroke of 3 points"),
        (MaskContour(rle=RLE), "mask contour, rle"),
    ],
)
def test_marks_are_said_in_a_line(mark: Mark, line: str):
    assert describe(mark) == line


def test_the_same_mark_by_option_command_and_python_is_the_same_plan():
    fields: dict[str, Any] = {"colour": "blue", "alpha": 100, "width": 4}
    made = [
        Ellipse(BOX, **fields),
        mark_of_words("box", "10,20,30,40 ellipse blue alpha=100 width=4"),
        *marks_of_options(options("box 10,20,30,40 shape ellipse colour blue alpha 100 width 4")),
    ]
    plans = [plan_marks([mark], (64, 64)) for mark in made]
    assert plans[0] == plans[1] == plans[2]
