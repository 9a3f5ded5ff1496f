"""The picture of the eight shapes."""

from __future__ import annotations

import numpy as np
import pytest

from vipllava.report import shapes_image
from vipllava.visual_prompts.shapes import SHAPES


def test_every_shape_has_a_tile_with_its_words():
    subjects = shapes_image._SUBJECTS
    assert [subject.shape for subject in subjects] == [
        "rectangle", "ellipse", "point", "triangle", "mask", "mask contour", "arrow", "scribble",
    ]  # fmt: skip
    assert {subject.shape for subject in subjects} == set(SHAPES)
    words = [shapes_image._draw_tile(subject)[1] for subject in subjects]
    assert words == [
        "within the red rectangle",
        "within the purple ellipse",
        "at the fuchsia point",
        "with the yellow triangle",
        "with the blue mask",
        "with the aqua mask contour",
        "pointed to by the orange arrow",
        "with the lime scribble",
    ]


@pytest.mark.parametrize("subject", shapes_image._SUBJECTS, ids=lambda subject: subject.shape)
def test_every_tile_shows_its_mark(subject, monkeypatch: pytest.MonkeyPatch):
    marked, _ = shapes_image._draw_tile(subject)
    monkeypatch.setattr(shapes_image, "render_plan", lambda image, plan: image)
    photograph, _ = shapes_image._draw_tile(subject)
    changed = (np.asarray(marked) != np.asarray(photograph)).any(axis=2).mean()
    assert 0.002 < changed < 0.5  # the short arrow: 0.0027


def test_the_sheet_is_the_same_every_time():
    first, second = shapes_image.draw_shapes_image(), shapes_image.draw_shapes_image()
    assert first.size == (1700, 788)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
