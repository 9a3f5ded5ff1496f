"""Drawing: exact pixels. What holds for any mark is in ``test_mark_properties.py``."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vipllava.types import RecordError, Stroke, VisualPrompt, VisualPromptPlan
from vipllava.visual_prompts.render import render_plan


def changed_pixels(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Return a boolean array [height, width] of pixels that differ."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def test_opacity_is_alpha_compositing():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    prompt = VisualPrompt(
        0, "rectangle", (255, 0, 0), "red", 128, (Stroke("box", ((2, 2), (5, 5)), 0),)
    )
    marked = render_plan(image, VisualPromptPlan((8, 8), (prompt,)))
    assert marked.getpixel((3, 3)) == (178, 50, 50)
    assert marked.getpixel((0, 0)) == (100, 100, 100)


def test_strokes_of_one_mark_do_not_add_up():
    image = Image.new("RGB", (16, 16))
    cross = (Stroke("line", ((2, 8), (13, 8)), 3), Stroke("line", ((8, 2), (8, 13)), 3))
    prompt = VisualPrompt(0, "arrow", (200, 200, 200), None, 128, cross)
    marked = np.asarray(render_plan(image, VisualPromptPlan((16, 16), (prompt,))))
    assert set(np.unique(marked).tolist()) == {0, 100}


def test_rectangle_pixels_are_exact():
    image = Image.new("RGB", (10, 10))
    prompt = VisualPrompt(
        0, "rectangle", (0, 0, 255), "blue", 255, (Stroke("box", ((2, 3), (7, 8)), 1),)
    )
    marked = render_plan(image, VisualPromptPlan((10, 10), (prompt,)))
    expected = np.zeros((10, 10), bool)
    expected[3:9, 2:8] = True
    expected[4:8, 3:7] = False
    assert (changed_pixels(image, marked) == expected).all()


def test_marks_beyond_the_picture_are_clipped():
    image = Image.new("RGB", (20, 20))
    outside = Stroke("ellipse", ((-30.0, -30.0), (-10.0, -10.0)))
    partly = Stroke("ellipse", ((15.0, 15.0), (40.0, 40.0)))
    prompts = tuple(
        VisualPrompt(i, "point", (255, 255, 255), None, 255, (stroke,))
        for i, stroke in enumerate((outside, partly))
    )
    assert not changed_pixels(
        image, render_plan(image, VisualPromptPlan((20, 20), prompts[:1]))
    ).any()
    assert changed_pixels(image, render_plan(image, VisualPromptPlan((20, 20), prompts))).any()


def test_a_plan_for_another_picture_is_refused():
    with pytest.raises(RecordError, match="sample the plan from the picture"):
        render_plan(Image.new("RGB", (9, 9)), VisualPromptPlan((10, 10)))
    with pytest.raises(RecordError, match="RGB"):
        render_plan(Image.new("L", (10, 10)), VisualPromptPlan((10, 10)))
