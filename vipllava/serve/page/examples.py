"""Pictures to begin with: scenes of the sample world, and photographs that a package carries."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

from vipllava.keyed_random import generator_for
from vipllava.records.image_decode import decode_image

_NUM_SCENES: Final = 4
_SCENE_ALPHA: Final = 220
"""Within what the tiny models of the quick start were trained with."""
_PHOTOGRAPHS: Final[tuple[tuple[str, str, tuple[dict[str, Any], ...]], ...]] = (
    ("coffee.png", "What is {0}?", (
        {"shape": "ellipse", "box": [175, 50, 455, 290], "colour": "red"},)),
    ("chelsea.png", "What is {0} looking at?", (
        {"shape": "arrow", "stroke": [[420, 30], [290, 95]], "colour": "lime"},)),
    ("astronaut.png", "How do {0} and {1} belong together?", (
        {"shape": "rectangle", "box": [165, 5, 290, 180], "colour": "blue"},
        {"shape": "rectangle", "box": [5, 5, 120, 290], "colour": "yellow"})),
)  # fmt: skip
"""Files of ``skimage.data``, in the public domain or free to use: a question and its marks each."""


@dataclass(frozen=True)
class Example:
    """A picture with marks on it and a question about them."""

    image: Image.Image
    marks: tuple[dict[str, Any], ...]  # as :func:`vipllava.visual_prompts.mark_fields.parse_marks`
    question: str
    sha256: str


def sample_examples() -> Sequence[Example]:
    """Return what the extra ``sample`` brings; nothing without it."""
    if any(importlib.util.find_spec(name) is None for name in ("skimage", "sklearn")):
        return ()
    return (*map(_scene, range(_NUM_SCENES)), *_photographs())


def _scene(number: int) -> Example:
    from vipllava.sample_world.scenes import compose_scene

    scene = compose_scene(generator_for(7, "page", str(number)), "heldout")
    first, second = scene.objects[:2]
    box, other = ([round(v, 1) for v in item.bbox_xyxy] for item in (first, second))
    ring = max(first.polygons, key=len)  # its body
    x1, y1, x2, y2 = first.bbox_xyxy
    marks: tuple[tuple[dict[str, Any], ...], str] = (
        (({"shape": "rectangle", "box": box, "colour": "red"},), "What is the object {0}?"),
        (({"shape": "mask contour", "polygon": [list(p) for p in ring], "colour": "yellow"},),
         "What is the object {0}?"),
        (({"shape": "ellipse", "box": box, "colour": "blue"},
          {"shape": "ellipse", "box": other, "colour": "red"}),
         "What is the sum of the digits {0} and {1}?"),
        (({"shape": "point", "point": [(x1 + x2) / 2, (y1 + y2) / 2], "colour": "fuchsia"},),
         "What is the object {0}?"),
    )[number % _NUM_SCENES]  # fmt: skip
    drawn, question = marks
    drawn = tuple(mark | {"alpha": _SCENE_ALPHA} for mark in drawn)
    return Example(scene.image, drawn, question, _digest(scene.jpeg()))


def _photographs() -> Sequence[Example]:
    folder = importlib.resources.files("skimage.data")
    found: list[Example] = []
    for name, question, marks in _PHOTOGRAPHS:
        data = (folder / name).read_bytes()
        found.append(Example(decode_image(data, name), marks, question, _digest(data)))
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
