"""What holds for every mark: any shape, picture, place and region, however small or broken."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vipllava.keyed_random import generator_for
from vipllava.types import (
    BBox,
    FixedVisualPrompt,
    Point,
    Polygon,
    Region,
    Shape,
    VisualPrompt,
    VisualPromptPlan,
)
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import _paint, mark_opacity, render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import (
    LEAST_REGION_SIDE,
    LEAST_VISIBLE_PIXELS,
    SHAPES,
    mark_bounds,
)

deterministic = settings(max_examples=60, deadline=None, derandomize=True, database=None)
"""The same examples in every run, quick enough for every push."""


@dataclass(frozen=True)
class Scene:
    """A picture's size, a region in it, and what its mark is drawn with."""

    size: tuple[int, int]
    region: Region
    seed: int


def ring_of(bbox: BBox, kind: str) -> tuple[Polygon, ...]:
    """Return rings that fill the box's extent, or hardly anything of it."""
    x1, y1, x2, y2 = bbox
    cx, cy, rx, ry = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2

    def star(count: int, inner: float) -> Polygon:
        points: list[Point] = []
        for k in range(count):
            reach = 1.0 if k % 2 == 0 else inner
            angle = 2 * math.pi * k / count
            points.append((cx + reach * rx * math.cos(angle), cy + reach * ry * math.sin(angle)))
        return tuple(points)

    return {
        "none": (),
        "round": (star(12, 1.0),),
        "star": (star(16, 0.5),),
        "two": (
            ((x1, y1), (cx, y1), (cx, cy), (x1, cy)),
            ((cx, cy), (x2, cy), (x2, y2), (cx, y2)),
        ),
        "line": (((x1, y1), (cx, cy), (x2, y2)),),
        "dot": (((cx, cy),) * 3,),
        "bow tie": (((x1, y1), (x2, y2), (x2, y1), (x1, y2)),),
    }[kind]


SOUND = ("none", "round", "star", "two")
ANY = (*SOUND, "line", "dot", "bow tie")


@st.composite
def scenes(draw: st.DrawFn, least: float, masks: tuple[str, ...]) -> Scene:
    """Draw a scene whose region is at least ``least`` pixels wide and high."""
    size = draw(st.integers(16, 2000)), draw(st.integers(16, 2000))

    def side(length: int) -> tuple[float, float]:
        form = draw(st.sampled_from(("full", "small", "any", "whole")))
        extent = {
            "full": float(length),
            "small": draw(st.floats(least, min(4 * least, length))),
            "any": draw(st.floats(least, length)),
            "whole": float(draw(st.integers(math.ceil(least), length))),
        }[form]
        place = draw(st.sampled_from(("start", "end", "between", "whole")))
        free = length - extent
        start = {
            "start": 0.0,
            "end": free,
            "between": draw(st.floats(0, 1)) * free,
            "whole": float(math.floor(draw(st.floats(0, 1)) * free)),
        }[place]
        return start, min(start + extent, float(length))

    (x1, x2), (y1, y2) = side(size[0]), side(size[1])
    bbox = x1, y1, x2, y2
    region = Region(bbox, ring_of(bbox, draw(st.sampled_from(masks))))
    return Scene(size, region, draw(st.integers(0, 10**6)))


def mark_of(scene: Scene, shape: Shape, **policy: object) -> VisualPrompt:
    chosen = VisualPromptPolicy(shapes=(shape,), **policy)  # type: ignore[arg-type]
    rng = generator_for("mark", scene.seed)
    return sample_plan([scene.region], scene.size, chosen, rng).prompts[0]


def painted_by(prompt: VisualPrompt, size: tuple[int, int]) -> np.ndarray:
    """Return the opacity over the whole picture, [height, width]."""
    whole = Image.new("L", size)
    if (painted := mark_opacity(prompt, size)) is not None:
        whole.paste(*painted)
    return np.asarray(whole)


@pytest.mark.parametrize("shape", SHAPES)
@deterministic
@given(scene=scenes(LEAST_REGION_SIDE, SOUND))
def test_a_mark_stays_in_its_bounds_and_is_seen(shape: Shape, scene: Scene) -> None:
    check_bounds(scene, mark_of(scene, shape), LEAST_VISIBLE_PIXELS)


@pytest.mark.parametrize("shape", SHAPES)
@deterministic
@given(scene=scenes(1.0, ANY))
def test_even_a_tiny_or_broken_region_gets_a_mark(shape: Shape, scene: Scene) -> None:
    check_bounds(scene, mark_of(scene, shape), 1)


def check_bounds(scene: Scene, prompt: VisualPrompt, least: int) -> None:
    opacity = painted_by(prompt, scene.size)
    rows, columns = np.nonzero(opacity)
    assert len(rows) >= least
    assert set(np.unique(opacity).tolist()) <= {0, prompt.alpha}
    left, top, right, bottom = mark_bounds(prompt)
    assert math.floor(left) <= columns.min() <= columns.max() <= math.ceil(right)
    assert math.floor(top) <= rows.min() <= rows.max() <= math.ceil(bottom)


@pytest.mark.parametrize("shape", SHAPES)
@deterministic
@given(scene=scenes(1.0, ANY))
def test_the_bounds_cut_nothing_off(shape: Shape, scene: Scene) -> None:
    """The same strokes on a layer as large as the picture paint the same pixels."""
    prompt = mark_of(scene, shape)
    layer = Image.new("L", scene.size)
    canvas = ImageDraw.Draw(layer)
    for stroke in prompt.strokes:
        _paint(canvas, stroke, list(stroke.points), prompt.alpha)
    painted = mark_opacity(prompt, scene.size)
    assert painted is not None
    opacity, (left, top) = painted
    box = left, top, left + opacity.width, top + opacity.height
    reached = layer.getbbox()
    assert reached is not None
    assert box[0] <= reached[0]
    assert box[1] <= reached[1]
    assert reached[2] <= box[2]
    assert reached[3] <= box[3]
    # Coordinates may round in another way once the offset is taken off them.
    different = np.asarray(layer.crop(box)) != np.asarray(opacity)
    assert different.sum() <= 8


@pytest.mark.parametrize("shape", SHAPES)
@settings(deterministic, max_examples=15)
@given(scene=scenes(LEAST_REGION_SIDE, SOUND))
def test_drawing_blends_inside_the_mark_and_leaves_all_else(shape: Shape, scene: Scene) -> None:
    width, height = scene.size
    gradient = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    image = Image.fromarray(gradient)
    prompt = mark_of(scene, shape, fixed_alpha=255 if scene.seed % 2 else None)
    marked = np.asarray(render_plan(image, VisualPromptPlan(scene.size, (prompt,))))
    assert (np.asarray(image) == gradient).all()
    opacity = painted_by(prompt, scene.size)
    assert (marked[opacity == 0] == gradient[opacity == 0]).all()
    share = prompt.alpha / 255
    inside = opacity > 0
    blended = share * np.array(prompt.rgb) + (1 - share) * gradient[inside]
    assert np.abs(marked[inside] - blended).max() <= 1
    if prompt.alpha == 255:
        assert (marked[inside] == prompt.rgb).all()


@deterministic
@given(
    shape=st.sampled_from(SHAPES),
    colour=st.sampled_from(["red", "gold", (1, 2, 3)]),
    width=st.integers(1, 20),
    alpha=st.integers(1, 255),
    scene=scenes(LEAST_REGION_SIDE, SOUND),
)
def test_what_is_fixed_is_drawn(
    shape: Shape, colour: str | tuple[int, int, int], width: int, alpha: int, scene: Scene
) -> None:
    fixed = [FixedVisualPrompt(shape, colour, width, alpha)]
    rng = generator_for("fixed", scene.seed)
    plan = sample_plan([scene.region], scene.size, VisualPromptPolicy(), rng, fixed)
    (prompt,) = plan.prompts
    named = {"red": (255, 0, 0), "gold": (255, 215, 0)}
    rgb = named[colour] if isinstance(colour, str) else colour
    assert (prompt.shape, prompt.rgb, prompt.alpha) == (shape, rgb, alpha)
    assert prompt.colour_name == (colour if isinstance(colour, str) else None)
    drawn = prompt.strokes[0]
    match shape:
        case "mask":
            assert drawn.width == 0
        case "mask contour":
            assert drawn.width == 2 * width + 1
        case "point":
            (x1, y1), (x2, y2) = drawn.points
            assert (x2 - x1) * (y2 - y1) == pytest.approx((2 * width) ** 2)
        case _:
            assert drawn.width == width
    check_bounds(scene, prompt, 1)


def test_an_ellipse_around_the_picture_comes_back_into_it() -> None:
    """Enlarged by more than the square root of two, it would lie outside of every corner."""
    size = (64, 48)
    for seed in range(50):
        scene = Scene(size, Region((0.0, 0.0, 64.0, 48.0)), seed)
        prompt = mark_of(scene, "ellipse")
        (x1, y1), (x2, y2) = prompt.strokes[0].points
        assert (x1, y1, x2, y2) == (0, 0, 63, 47)
        assert (painted_by(prompt, size) > 0).sum() > 100


def test_an_outline_wider_than_its_box_fills_it() -> None:
    scene = Scene((40, 40), Region((5.0, 5.0, 15.0, 8.0)), 0)
    fixed = [FixedVisualPrompt("rectangle", "red", 8, 255)]
    plan = sample_plan([scene.region], scene.size, VisualPromptPolicy(), generator_for(0), fixed)
    expected = np.zeros((40, 40), np.uint8)
    expected[5:9, 5:16] = 255
    np.testing.assert_array_equal(painted_by(plan.prompts[0], scene.size), expected)


def test_a_mark_wholly_outside_paints_nothing() -> None:
    plan = sample_plan(
        [Region((900.0, 900.0, 950.0, 950.0))],
        (64, 48),
        VisualPromptPolicy(shapes=("rectangle",)),
        generator_for(0),
    )
    assert mark_opacity(plan.prompts[0], (64, 48)) is None
