"""How a region is told to a model: by a drawn mark, or as models know it that never saw one.

overlay      the marks of the plan, in the plan's words: what ViP-LLaVA is trained with
coordinates  the stored image; the text names a box or a point in numbers
set_of_mark  a number drawn on each region; the text names the number
crop         the image and behind it a crop of each region; the text names the crop
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from vipllava.evaluation.bench import ALL_MARKS, Marks
from vipllava.evaluation.marking import MarkedItem
from vipllava.types import BBox, ConfigError, DraftTurn, Region, Request, Turn
from vipllava.visual_prompts.mask_pixels import MaskPixels
from vipllava.visual_prompts.render import render_plan

Encoding = Literal["overlay", "coordinates", "set_of_mark", "crop"]
Scale = Literal["pixels", "unit", "thousand"]
Form = Literal["box", "point"]

_MARKS: Final[dict[str, tuple[Marks, ...]]] = {
    "overlay": ALL_MARKS,
    "coordinates": ("kept", "moved"),
    "set_of_mark": ("kept", "removed", "moved"),
    "crop": ("kept", "moved"),
}
"""What can become of marks; numbers in a text, e.g., are neither drawn nor coloured."""
_WORDS: Final[dict[Form, str]] = {
    "box": "within the box [{x1}, {y1}, {x2}, {y2}]",
    "point": "at the point ({x}, {y})",
}
_LABEL_HEIGHT: Final = 1 / 18  # of the longer side of the image


@dataclass(frozen=True)
class Coordinates:
    """The convention of a model for regions in numbers.

    Attributes:
        scale: ``pixels`` of the image (Qwen2.5-VL), shares of width and height as ``unit`` with
            three decimals (LLaVA, Shikra), or whole thousandths of them as ``thousand`` (Qwen3-VL,
            InternVL).
        form: ``box`` or ``point``, the middle of the box.
        words: the wording of a mention, with ``{x1} {y1} {x2} {y2}`` or ``{x} {y}``; None for a
            plain one, e.g. ``within the box [10, 20, 30, 40]``.

    Raises:
        ConfigError: there is no such scale or form, or the wording has other places.
    """

    scale: Scale = "pixels"
    form: Form = "box"
    words: str | None = None

    def __post_init__(self) -> None:
        """Refuse what says no region."""
        for name, kind in (("scale", Scale), ("form", Form)):
            if (value := getattr(self, name)) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"coordinates.{name}={value}: expected one of {known}")
        try:
            # Two regions must not read the same.
            told = self.tell((0, 0, 4, 4), (8, 8)) != self.tell((2, 2, 8, 8), (8, 8))
        except (KeyError, IndexError, ValueError):
            told = False
        if not told:
            places = "{x1} {y1} {x2} {y2}" if self.form == "box" else "{x} {y}"
            raise ConfigError(
                f"coordinates.words={self.words}: expected a wording with the places {places}"
            )

    def tell(self, box: BBox, size: tuple[int, int]) -> str:
        """Return the words of a box of an image of a width and height."""
        x1, y1, x2, y2 = box
        named = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        if self.form == "point":
            named = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2}
        values = {
            name: self._number(value, size[0 if name.startswith("x") else 1])
            for name, value in named.items()
        }
        return (self.words or _WORDS[self.form]).format(**values)

    def _number(self, value: float, length: int) -> str:
        if self.scale == "unit":
            return f"{value / length:.3f}"
        return str(round(value if self.scale == "pixels" else 1000 * value / length))


def check_encoding(encoding: str, marks: Sequence[Marks], *, several_images: bool) -> None:
    """Raise ConfigError unless items can be asked this way with these marks.

    Args:
        encoding: its name.
        marks: what becomes of the marks.
        several_images: whether the model takes several images.
    """
    if encoding not in _MARKS:
        known = ", ".join(_MARKS)
        raise ConfigError(f"encoding={encoding}: expected one of {known}")
    possible = _MARKS[encoding]
    if wrong := [each for each in marks if each not in possible]:
        raise ConfigError(
            f"encoding={encoding} with marks={','.join(wrong)}: it draws no marks of which that "
            f"could become; it takes {', '.join(possible)}"
        )
    if encoding == "crop" and not several_images:
        raise ConfigError(
            "encoding=crop shows a region as a second image, and this model takes one; use "
            "coordinates, set_of_mark or overlay"
        )


def encode_item(
    image: Image.Image | None,
    marked: MarkedItem,
    key: str,
    encoding: Encoding = "overlay",
    coordinates: Coordinates | None = None,
    resize: tuple[int, int] | None = None,
) -> Request:
    """Return the request of a marked item.

    Args:
        image: as stored, RGB; None for an item without one.
        marked: of this image's size.
        key: names the item in errors.
        encoding: how its regions are told.
        coordinates: the convention of ``coordinates``.
        resize: width and height of the image with its marks as the benchmark's protocol has them;
            only ``overlay`` follows that.
    """
    regions = marked.sample.regions
    if image is None:
        return Request(None, marked.turns, key)
    if encoding == "overlay" or not regions:
        drawn = render_plan(image, marked.plan)
        if resize is not None and drawn.size != resize:
            drawn = drawn.resize(resize, Image.Resampling.BICUBIC)
        return Request(drawn, marked.turns, key)
    words = _words(regions, image.size, encoding, coordinates)
    drafts = marked.sample.turns[: len(marked.turns)]
    turns = tuple(Turn(each.role, _text(each, words), each.has_image) for each in drafts)
    if encoding == "coordinates":
        return Request(image, turns, key)
    if encoding == "set_of_mark":
        drawn = _numbered(image, regions) if marked.plan.prompts else image
        return Request(drawn, turns, key)
    return Request(image, turns, key, tuple(_crop(image, region) for region in regions))


def encode_truth(
    image: Image.Image | None,
    marked: MarkedItem,
    encoding: Encoding = "overlay",
    coordinates: Coordinates | None = None,
) -> object:
    """Return the ground truth in the words of the request: a model can repeat no others.

    One that mentions no mark stays as it is; for the arguments see :func:`encode_item`.
    """
    regions = marked.sample.regions
    if marked.answer is None or image is None or encoding == "overlay" or not regions:
        return marked.ground_truth
    return _text(marked.answer, _words(regions, image.size, encoding, coordinates))


def _words(
    regions: Sequence[Region],
    size: tuple[int, int],
    encoding: Encoding,
    coordinates: Coordinates | None,
) -> Callable[[int], str]:
    """Return what says the words of a region by its number, of an encoding that is no overlay."""
    if encoding == "coordinates":
        convention = coordinates or Coordinates()
        return lambda index: convention.tell(regions[index].bbox_xyxy, size)
    if encoding == "set_of_mark":
        return lambda index: f"marked with the number {index + 1}"
    return lambda index: f"shown in image {index + 2}"


def _text(draft: DraftTurn, words: Callable[[int], str]) -> str:
    return "".join(p if isinstance(p, str) else words(p.region) for p in draft.parts)


def _numbered(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Draw a number, white on black, in the middle of every region, of run lengths on the mask."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(max(10, round(max(image.size) * _LABEL_HEIGHT)))
    for number, region in enumerate(regions, start=1):
        x1, y1, x2, y2 = region.bbox_xyxy
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        if region.rle is not None:
            middle = MaskPixels.of(region.rle).nearest(middle)
        left, top, right, bottom = canvas.textbbox(middle, str(number), font=font, anchor="mm")
        canvas.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=(0, 0, 0))
        canvas.text(middle, str(number), fill=(255, 255, 255), font=font, anchor="mm")
    return drawn


def _crop(image: Image.Image, region: Region) -> Image.Image:
    """Cut out a region's box; one without area is a pixel wide."""
    x1, y1, x2, y2 = map(round, region.bbox_xyxy)
    x1, y1 = min(x1, image.width - 1), min(y1, image.height - 1)
    return image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
