"""Scenes: a crop of a real photograph with three or four objects of known box and mask.

Training and held-out scenes never share an image: they have random keys of their own, so crops,
light and layouts differ, and their handwritten digits are other samples. The dozen
photographs that backgrounds are cropped from serve both.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vipllava.records.wording import choose
from vipllava.sample_world.objects import DIGITS, DRAWINGS
from vipllava.types import RGB, BBox, Point, Polygon, Region

Split = Literal["train", "heldout"]

LONGER_SIDE: Final = 168
"""Pixels of a scene's longer side: one and a half times the tiny model's input."""
_SHORTER_SIDES: Final = (132, 169)
_OBJECT_SIZES: Final = (46, 63)
_SUPERSAMPLING: Final = 3
_DRAWN_SHARE: Final = 0.75
_CARD: Final[tuple[Point, ...]] = ((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96))

# Carried in the wheels themselves; nothing is downloaded.
_PHOTOGRAPHS: Final = {
    "sklearn.datasets.images": ("china.jpg",),
    "skimage.data": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
        "grass.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
    ),
}  # fmt: skip
_LIGHT: Final = (0.7, 1.2)
"""Gain of each colour channel of a background, uniform."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its kind (a name or a digit), box and mask in scene pixels."""

    kind: str
    bbox_xyxy: BBox
    polygons: tuple[Polygon, ...]

    @property
    def region(self) -> Region:
        """The object as a region that a mark can point at."""
        return Region(self.bbox_xyxy, self.polygons)

    @property
    def segmentation(self) -> list[list[float]]:
        """The mask as records have it: per ring x, y, x, y, ..."""
        return [[value for vertex in ring for value in vertex] for ring in self.polygons]

    @property
    def category(self) -> str:
        """What the object is: ``digit`` for a card, else the drawing's category."""
        return "digit" if self.kind in DIGITS else DRAWINGS[self.kind].category


@dataclass(frozen=True, slots=True)
class Scene:
    """A composed image and what stands in it, ordered from left to right."""

    image: Image.Image
    objects: tuple[SceneObject, ...]

    def jpeg(self) -> bytes:
        """Encode the image as it is stored."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="JPEG", quality=88)
        return buffer.getvalue()


def compose_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """Compose a scene of three or four objects of different kinds that do not overlap."""
    shorter = int(rng.integers(*_SHORTER_SIDES))
    size = (LONGER_SIDE, shorter) if rng.random() < 0.5 else (shorter, LONGER_SIDE)
    image = _background(size, rng)
    count = int(rng.integers(3, 5))
    kinds, places = sample_kinds(count, rng), _sample_places(count, size, rng)
    objects = [
        _place(image, kind, place, rng, split) for kind, place in zip(kinds, places, strict=True)
    ]
    return Scene(image, tuple(sorted(objects, key=lambda item: item.bbox_xyxy[0])))


def sample_kinds(count: int, rng: np.random.Generator) -> list[str]:
    """Draw ``count`` different kinds, drawn objects more often than digits."""
    drawn = tuple(DRAWINGS)
    kinds: list[str] = []
    while len(kinds) < count:
        pool = drawn if rng.random() < _DRAWN_SHARE else DIGITS
        if (kind := choose(pool, rng)) not in kinds:
            kinds.append(kind)
    return kinds


def _sample_places(
    count: int, size: tuple[int, int], rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """Draw left, top and side of ``count`` squares that do not overlap; dense tries restart."""
    while True:
        places: list[tuple[int, int, int]] = []
        for _ in range(40):
            side = int(rng.integers(*_OBJECT_SIZES))
            left, top = (int(rng.integers(0, length - side + 1)) for length in size)
            if all(
                left >= x + s or x >= left + side or top >= y + s or y >= top + side
                for x, y, s in places
            ):
                places.append((left, top, side))
            if len(places) == count:
                return places


def _place(
    image: Image.Image,
    kind: str,
    place: tuple[int, int, int],
    rng: np.random.Generator,
    split: Split,
) -> SceneObject:
    left, top, side = place
    fine = side * _SUPERSAMPLING
    canvas = Image.new("RGBA", (fine, fine), (0, 0, 0, 0))
    turn = math.radians(float(rng.uniform(-12, 12)))
    shade = float(rng.uniform(0.85, 1.15))
    if kind in DIGITS:
        rings = [_turned(_CARD, turn)]
        _draw_card(canvas, int(kind), rings[0], turn, rng, split)
    else:
        drawing = DRAWINGS[kind]
        body = choose(drawing.bodies, rng)
        mirrored = rng.random() < 0.5
        pen, rings = ImageDraw.Draw(canvas), []
        for part in drawing.parts:
            polygon = tuple((1 - x, y) for x, y in part.polygon) if mirrored else part.polygon
            ring = _turned(polygon, turn)
            colour = _shaded(part.fill or body, shade)
            pen.polygon([(x * fine, y * fine) for x, y in ring], fill=(*colour, 255))
            if part.silhouette:
                rings.append(ring)
    sprite = canvas.resize((side, side), Image.Resampling.BOX)
    image.paste(sprite, (left, top), sprite)
    polygons = tuple(
        tuple((round(left + x * side, 2), round(top + y * side, 2)) for x, y in ring)
        for ring in rings
    )
    xs, ys = zip(*itertools.chain(*polygons), strict=True)
    return SceneObject(kind, (min(xs), min(ys), max(xs), max(ys)), polygons)


def _draw_card(
    canvas: Image.Image,
    digit: int,
    outline: Polygon,
    turn: float,
    rng: np.random.Generator,
    split: Split,
) -> None:
    """Draw a handwritten digit in dark ink on a pale card."""
    fine = canvas.width
    paper = _shaded((240, 236, 226), float(rng.uniform(0.9, 1.05)))
    ImageDraw.Draw(canvas).polygon([(x * fine, y * fine) for x, y in outline], fill=(*paper, 255))
    strokes = choose(_handwriting(split)[digit], rng)
    ink = Image.fromarray((strokes * 15.9).astype(np.uint8), mode="L")
    writing = Image.new("L", canvas.size, 0)
    inner = int(fine * 0.8)
    margin = (fine - inner) // 2
    writing.paste(ink.resize((inner, inner), Image.Resampling.BICUBIC), (margin, margin))
    writing = writing.rotate(-math.degrees(turn), Image.Resampling.BILINEAR)
    canvas.paste((*rng.integers(0, 70, size=3).tolist(), 255), (0, 0), writing)


def _turned(polygon: Polygon, angle: float) -> Polygon:
    """Rotate about the square's centre and shrink just enough to stay inside the square."""
    cos, sin = math.cos(angle), math.sin(angle)
    shrink = 1 / (abs(cos) + abs(sin))
    centred = [(x - 0.5, y - 0.5) for x, y in polygon]
    turned = [(cos * x - sin * y, sin * x + cos * y) for x, y in centred]
    return tuple((0.5 + shrink * x, 0.5 + shrink * y) for x, y in turned)


def _shaded(colour: RGB, factor: float) -> RGB:
    red, green, blue = (min(255, int(value * factor)) for value in colour)
    return red, green, blue


def _background(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    photograph = choose(_photographs(), rng)
    longest = min(photograph.width / size[0], photograph.height / size[1])
    zoom = float(rng.uniform(min(1.0, longest), longest))
    width, height = int(size[0] * zoom), int(size[1] * zoom)
    left = int(rng.integers(0, photograph.width - width + 1))
    top = int(rng.integers(0, photograph.height - height + 1))
    box = (left, top, left + width, top + height)
    crop = photograph.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = rng.uniform(*_LIGHT, size=3)
    return crop.point([min(255, int(level * gain)) for gain in gains for level in range(256)])


@functools.cache
def _photographs() -> Sequence[Image.Image]:
    files = importlib.resources.files
    paths = [files(package) / name for package, names in _PHOTOGRAPHS.items() for name in names]
    return [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in paths]


@functools.cache
def _handwriting(split: Split) -> dict[int, Sequence[npt.NDArray[np.float64]]]:
    """Real handwritten digits [n, 8, 8], values 0..16; every fifth sample is held out."""
    from sklearn.datasets import load_digits  # slow to import

    digits = cast("Any", load_digits())
    heldout = np.arange(len(digits.target)) % 5 == 0
    chosen = heldout if split == "heldout" else ~heldout
    return {d: digits.images[chosen & (digits.target == d)] for d in range(10)}
