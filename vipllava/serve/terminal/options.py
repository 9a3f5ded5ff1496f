"""Marks from what people type: the options of ``vipllava chat`` and its commands alike.

A place begins a mark, and what stands behind it is about its look::

    --box 100,200,200,300 --shape ellipse --colour blue --point 40,50 --colour 255,0,0
    /box 100,200,200,300 ellipse blue width=3

An option of the look in front of the first place is for all marks; one behind a place is for that
place, and goes before the one for all.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vipllava.types import RGB, Shape, VipLlavaError
from vipllava.visual_prompts.mark_places import MarkError, check_colour
from vipllava.visual_prompts.marks import MARKS, Mark
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

PLACES: Final[dict[str, Shape]] = {
    "box": "rectangle",
    "polygon": "mask",
    "point": "point",
    "stroke": "scribble",
    "rle": "mask",
}
"""The kinds of place, and the shape of a mark that names none."""
LOOKS: Final = ("shape", "colour", "width", "alpha")
"""What the options say of a mark besides its place."""

_COORDINATES: Final[dict[str, str]] = {
    "box": "x1,y1,x2,y2 in pixels",
    "point": "x,y in pixels",
    "polygon": "x,y,x,y,... in pixels, three points or more; a semicolon begins another ring",
    "stroke": "x,y,x,y,... in pixels, two points or more",
}
_NUMERIC: Final = re.compile(r"[-+.,;\deE]*\d[-+.,;\deE]*")
_HEX: Final = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")


def marks_of_options(given: Iterable[tuple[str, str]]) -> list[Mark]:
    """Return the marks that options describe, in the order of their places.

    Args:
        given: names (of ``PLACES`` and ``LOOKS``) and texts, as they stand in the command line.

    Raises:
        VipLlavaError: an option means nothing, stands twice for one place, or for none.
    """
    for_all: dict[str, str] = {}
    marks: list[tuple[str, str, dict[str, str]]] = []
    for name, text in given:
        if name in PLACES:
            marks.append((name, text, {}))
            continue
        look = marks[-1][2] if marks else for_all
        if name in look:
            where = f"--{marks[-1][0]} {marks[-1][1]}" if marks else "all marks"
            raise VipLlavaError(
                f"--{name} {look[name]} and --{name} {text} are both for {where}: an option stands "
                "behind the place that it is for, or once before the first one, for all"
            )
        look[name] = text
    if for_all and not marks:
        name, text = next(iter(for_all.items()))
        raise VipLlavaError(f"--{name} {text} is for no mark: say where, e.g. --box x1,y1,x2,y2")
    return [_mark_of_options(place, text, for_all | look) for place, text, look in marks]


def _mark_of_options(place: str, text: str, look: dict[str, str]) -> Mark:
    try:
        return _make_mark(place, text, look)
    except MarkError as error:
        said = {place: text} | look
        option = f"--{error.field} {said[error.field]}" if error.field in said else error.field
        raise VipLlavaError(f"{option}: expected {error.expected}") from error


def mark_of_words(place: str, words: str) -> Mark:
    """Return the mark of a command, e.g. ``100,200,200,300 ellipse blue width=3``.

    Args:
        place: of ``PLACES``.
        words: its coordinates (or the file of an ``rle``), then shape, colour and ``NAME=VALUE``
            for ``shape, colour, width, alpha, seed``, in any order.

    Raises:
        VipLlavaError: a word means nothing.
    """
    try:
        found = shlex.split(words) if place == "rle" else words.split()
    except ValueError as error:
        raise VipLlavaError(f"/{place} {words}: {error}") from error
    where = found[:1]
    rest = found[1:]
    while place != "rle" and rest and _NUMERIC.fullmatch(rest[0]):  # 10, 20, 30, 40
        where.append(rest.pop(0))
    if not where:
        wanted = _COORDINATES.get(place, "the file of a mask, JSON")
        raise VipLlavaError(f"/{place}: expected {wanted}")
    try:
        return _make_mark(place, " ".join(where), _look_of_words(rest))
    except MarkError as error:
        raise VipLlavaError(f"/{place} {words}: {error}") from error


def _look_of_words(words: Sequence[str]) -> dict[str, str]:
    look: dict[str, str] = {}
    numbered = iter(range(len(words)))
    for number in numbered:
        word = words[number]
        if word == "mask" and words[number + 1 : number + 2] == ["contour"]:
            next(numbered)
            word = "mask contour"
        name, equals, value = word.partition("=")
        if not equals:
            name, value = _kind_of(word), word
        name = "colour" if name == "color" else name
        if name not in (*LOOKS, "seed"):
            raise VipLlavaError(f"`{word}`: expected one of {', '.join(LOOKS)}, seed before the =")
        if name in look:
            raise VipLlavaError(f"`{look[name]}` and `{value}`: a mark has one {name}")
        look[name] = value
    return look


def _kind_of(word: str) -> str:
    """Tell whether a word is a shape or a colour."""
    if _shape_name(word) in SHAPES:
        return "shape"
    if word.lower() in PALETTE or word.startswith("#"):
        return "colour"
    near = difflib.get_close_matches(word.lower(), [*SHAPES, *PALETTE], 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise VipLlavaError(
        f"`{word}` is no shape and no colour{meant}; the shapes are {', '.join(SHAPES)}, the "
        f"colours {', '.join(PALETTE)}, or #rrggbb"
    )


def _make_mark(place: str, text: str, look: dict[str, str]) -> Mark:
    shape = PLACES[place]
    fields: dict[str, Any] = {}
    for name, value in look.items():
        if name == "shape":
            shape = read_shape(value)
        else:
            fields[name] = read_colour(value) if name == "colour" else _whole(name, value)
    return MARKS[shape](**{place: _read_place(place, text)}, **fields)


def read_shape(text: str) -> Shape:
    """Return a shape by its name; ``mask-contour`` is spelled without blanks in a shell.

    Raises:
        MarkError: there is none of this name.
    """
    name = _shape_name(text)
    if name not in SHAPES:
        raise MarkError("shape", text, f"one of {', '.join(SHAPES)}")
    return name


def _shape_name(text: str) -> Any:
    return re.sub(r"[-_ ]+", " ", text.strip().lower())


def read_colour(text: str) -> str | RGB:
    """Return a palette name, or the channels of ``r,g,b`` or ``#rrggbb``.

    Raises:
        MarkError: it is none of these.
    """
    text = text.strip()
    if hexadecimal := _HEX.fullmatch(text):
        red, green, blue = (int(part, 16) for part in hexadecimal.groups())
        return red, green, blue
    parts = text.split(",")
    value: object = text.lower()
    if len(parts) > 1 and all(part.strip().isdecimal() for part in parts):
        value = [int(part) for part in parts]
    try:
        colour = check_colour(value)
    except MarkError as error:
        wanted = f"one of {', '.join(PALETTE)}, or r,g,b of 0..255, or #rrggbb"
        raise MarkError("colour", text, wanted) from error
    assert colour is not None
    return colour


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[-+]?\d{1,19}", text.strip(), re.ASCII):
        raise MarkError(name, text, "a whole number")
    return int(text)


def _read_place(place: str, text: str) -> object:
    if place == "rle":
        return _read_rle(Path(text).expanduser())
    rings = [_numbers(place, part) for part in text.split(";")]
    (numbers, *others) = rings
    if others and place != "polygon":
        raise MarkError(place, text, _COORDINATES[place])
    if place in ("box", "point"):
        return numbers
    if any(len(ring) % 2 for ring in rings):
        raise MarkError(place, text, _COORDINATES[place])
    points = [list(zip(ring[::2], ring[1::2], strict=True)) for ring in rings]
    return points if place == "polygon" else points[0]


def _numbers(place: str, text: str) -> list[float]:
    try:
        return [float(word) for word in re.split(r"\s*,\s*|\s+", text.strip(" ,"))]
    except ValueError:
        raise MarkError(place, text, _COORDINATES[place]) from None


def _read_rle(path: Path) -> object:
    wanted = 'a file with a mask in COCO\'s run lengths, {"size": [height, width], "counts": ...}'
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MarkError("rle", str(path), f"{wanted} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise MarkError("rle", str(path), f"{wanted} (it is no JSON: {error})") from error


@contextmanager
def naming_marks() -> Generator[None]:
    """Let errors of marks on a picture name them as questions do: ``mark {1}: box is ...``."""
    try:
        yield
    except MarkError as error:
        said = re.sub(r"^regions\[(\d+)\]\.", r"mark {\1}: ", str(error))
        raise VipLlavaError(said) from error


def describe(mark: Mark) -> str:
    """Return a mark's place and look in one line, as a person would type them."""
    said = [mark.shape]
    for place in PLACES:
        value: Any = getattr(mark, place)
        if value is None:
            continue
        if place in ("box", "point"):
            said.append(f"{place} {','.join(format(number, 'g') for number in value)}")
        elif place == "rle":
            said.append("rle")
        else:
            num_points = len(value) if place == "stroke" else sum(map(len, value))
            said.append(f"{place} of {num_points} points")
    for name in ("width", "alpha"):
        if getattr(mark, name) is not None:
            said.append(f"{name} {getattr(mark, name)}")
    return ", ".join(said)
