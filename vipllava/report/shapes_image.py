"""One picture of the eight shapes on real photographs, each with the words that name it."""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from vipllava.keyed_random import generator_for
from vipllava.sample_world.objects import ellipse
from vipllava.types import BBox, FixedVisualPrompt, Point, Polygon, Region, Shape
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import prompt_words

TILE: Final = (400, 300)
_COLUMNS: Final = 4
_MARGIN, _CAPTION = 20, 64
_PAPER: Final = (252, 252, 251)
_INK: Final = (20, 20, 19)
_FAINT_INK: Final = (90, 89, 85)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What one tile shows; lengths are in pixels of the photograph."""

    shape: Shape
    colour: str
    photograph: str  # in scikit-image's data folder: carried in the wheel, never downloaded
    crop: BBox  # becomes the tile, 4 : 3
    polygon: Polygon  # outline of the marked thing, traced by hand
    seed: int  # of the mark's random parts, chosen so that the eight tiles look different


_FACE: Final[Polygon] = (
    (178, 106), (192, 88), (216, 80), (246, 86), (268, 102), (273, 126), (266, 152), (250, 174),
    (226, 188), (205, 183), (188, 162), (178, 134),
)  # fmt: skip
_SHUTTLE: Final[Polygon] = (
    (397, 22), (408, 2), (424, 2), (438, 22), (454, 44), (455, 196), (458, 262), (368, 268),
    (357, 216), (380, 180), (380, 56),
)  # fmt: skip
_HELMET: Final[Polygon] = (
    (279, 490), (281, 440), (298, 400), (330, 368), (378, 348), (430, 350), (468, 372), (490, 408),
    (497, 456), (508, 490), (506, 511), (280, 511),
)  # fmt: skip
_CUP: Final[Polygon] = (
    (173, 105), (180, 72), (205, 42), (250, 22), (295, 18), (340, 26), (380, 50), (403, 85),
    (408, 120), (400, 165), (378, 225), (350, 262), (310, 283), (262, 276), (240, 290),
    (222, 306), (203, 303), (196, 284), (205, 254), (216, 236), (190, 200), (175, 150),
)  # fmt: skip
_ROCKET: Final[Polygon] = (
    (311, 178), (311, 146), (321, 127), (333, 146), (334, 180), (333, 330), (311, 330),
)  # fmt: skip
_SEAT: Final[Polygon] = (
    (142, 166), (160, 158), (205, 168), (226, 170), (262, 185), (330, 188), (356, 192), (350, 214),
    (300, 250), (266, 256), (236, 220), (190, 208), (152, 206),
)  # fmt: skip

_SUBJECTS: Final = (
    _Subject("rectangle", "red", "astronaut.png", (139, 0, 512, 280), _SHUTTLE, 3),
    _Subject("ellipse", "purple", "astronaut.png", (86, 30, 366, 240), _FACE, 2),
    _Subject("point", "fuchsia", "chelsea.png", (51, 0, 451, 300),
             ellipse(171, 115, 35, 30, 32), 4),
    _Subject("triangle", "yellow", "motorcycle_left.png", (74, 80, 634, 500),
             ellipse(200, 320, 78, 82, 32), 1),
    _Subject("mask", "blue", "coffee.png", (60, 0, 540, 360), _CUP, 4),
    _Subject("mask contour", "aqua", "astronaut.png", (188, 269, 512, 512), _HELMET, 8),
    _Subject("arrow", "orange", "rocket.jpg", (170, 100, 490, 340), _ROCKET, 10),
    _Subject("scribble", "lime", "motorcycle_left.png", (40, 60, 440, 360), _SEAT, 2),
)  # fmt: skip


def draw_shapes_image() -> Image.Image:
    """Draw two rows of four tiles, each with the shape's name and its words in a question."""
    rows = math.ceil(len(_SUBJECTS) / _COLUMNS)
    width = _MARGIN + _COLUMNS * (TILE[0] + _MARGIN)
    height = _MARGIN + rows * (TILE[1] + _CAPTION + _MARGIN)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    name_font, words_font = ImageFont.load_default(24), ImageFont.load_default(19)
    for index, subject in enumerate(_SUBJECTS):
        row, column = divmod(index, _COLUMNS)
        left = _MARGIN + column * (TILE[0] + _MARGIN)
        top = _MARGIN + row * (TILE[1] + _CAPTION + _MARGIN)
        image, words = _draw_tile(subject)
        sheet.paste(image, (left, top))
        draw.text((left, top + TILE[1] + 6), subject.shape, _INK, name_font)
        draw.text((left, top + TILE[1] + 36), f"\u201c{words}\u201d", _FAINT_INK, words_font)
    return sheet


def _draw_tile(subject: _Subject) -> tuple[Image.Image, str]:
    """Crop first and mark the crop: line widths belong to the picture that is shown."""
    files: Any = importlib.resources.files("skimage.data")
    with (files / subject.photograph).open("rb") as file:
        photograph = Image.open(file).convert("RGB")
    tile = photograph.resize(TILE, Image.Resampling.BICUBIC, box=subject.crop)
    x1, y1, x2, y2 = subject.crop

    def moved(point: Point) -> Point:
        return (point[0] - x1) * TILE[0] / (x2 - x1), (point[1] - y1) * TILE[1] / (y2 - y1)

    ring = tuple(map(moved, subject.polygon))
    xs, ys = [x for x, _ in ring], [y for _, y in ring]
    plan = sample_plan(
        [Region((min(xs), min(ys), max(xs), max(ys)), (ring,))],
        TILE,
        VisualPromptPolicy(),
        generator_for("shapes_picture", subject.shape, subject.seed),
        [FixedVisualPrompt(shape=subject.shape, colour=subject.colour)],
    )
    return render_plan(tile, plan), prompt_words(plan.prompts[0])
