"""What every format is read into, and what a reader is given.

A reader only says what stands in the export: which pictures, and of each region its category and
how to compute its outline. Whether pictures are there, in which frame pixels are counted and
whether outlines fit are questions that all formats share; the other modules here answer them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

from vipllava.records.fields import is_number, list_or_empty
from vipllava.types import BBox, Point, Polygon, RecordError, Shape, VipLlavaError

Size = tuple[int, int]
"""Width and height, pixels."""
Frame = Literal["upright", "stored"]
"""Pixels turned as the EXIF block of a picture says, or as they lie in its file."""
_SHOWN: Final = 80
_LARGEST: Final = 10**9
"""Pixels that a stated side counts at most: far beyond any picture, and still a float."""


class ImportingError(VipLlavaError):
    """An export cannot be imported; nothing was written."""


class Outline(NamedTuple):
    """Where a region is, in pixels of its picture's frame."""

    bbox: BBox | None = None  # None: around polygons or mask
    polygons: tuple[Polygon, ...] = ()
    # A mask with holes or of many pieces: ``{"size": [height, width], "counts"}`` as of COCO.
    rle: Mapping[str, Any] | None = None
    shape: Shape | None = None  # of the mark, where the tool fixes it: a point stays a point
    note: tuple[str, str] | None = None  # code and message of what had to be decided


@dataclass(frozen=True, slots=True)
class SourceRegion:
    """One annotated region."""

    id: str  # as a reader of the export finds it, e.g. ``annotation 17``
    category: str | None  # None: the export names none; ``why_no_category`` says what is wrong
    # Called with the size of the picture once that is known. RecordError says what of the region
    # means nothing, with its class of :mod:`vipllava.ingest.importing.report`.
    outline: Callable[[Size], Outline]
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])  # for templates
    why_no_category: str = "it has no category"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One picture and its regions."""

    id: str  # unique in the export, e.g. ``image 397133``
    file: str  # of the export that lists it, for messages
    name: str  # as the export calls the picture
    regions: tuple[SourceRegion, ...]
    stated: Size | None = None  # what the export says of its size
    # Returns the encoded picture, where the export holds it; RecordError for what is none. A file
    # that is there comes first.
    embedded: Callable[[], bytes] | None = None
    folders: tuple[Path, ...] = ()  # where to look for it


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a user may say about an export; None where the format decides."""

    images: Path | None = None  # folder of the pictures
    category: str | None = None  # the attribute that ``{category}`` means
    split: str | None = None  # part of a data set, ``all`` for all of them
    box_form: str | None = None  # how boxes are written
    crowds: bool = True  # whether regions of many objects count


@dataclass(slots=True)
class Export:
    """An export under reading."""

    source: Path
    options: ImportOptions
    # Say something of a place (file and id): code, place, message. An error takes the place out.
    fault: Callable[[str, str, str], None]
    facts: dict[str, str] = field(default_factory=dict[str, str])  # what the summary says more


@dataclass(frozen=True, slots=True)
class ImportFormat:
    """All that the package knows of one format, in one value.

    Attributes:
        name: what the command line says.
        title: what a person calls it.
        read: yields the pictures of an export.
        is_head: whether the beginning of a text file is one of this format. Exports may be larger
            than what is looked at.
        frame: which pixels the tool counts where a picture has an EXIF orientation and nothing
            else tells; None where tools that write the format differ.
        why: where that is known from, for a person.
        is_folder: whether a folder is one of this format; None where none is.
        options: those of :class:`ImportOptions` that mean something, beside ``images``.
    """

    name: str
    title: str
    read: Callable[[Export], Iterator[SourceImage]]
    is_head: Callable[[str], bool]
    frame: Frame | None
    why: str
    is_folder: Callable[[Path], bool] | None = None
    options: tuple[str, ...] = ()


def load_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        ImportingError: it is missing, unreadable or no JSON; names the place.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ImportingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ImportingError(f"{path} is not JSON ({error}); export it again") from error


def object_or_empty(value: object) -> dict[str, Any]:
    """Return an object as it is, nothing for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def numbers(
    values: object, count: int | None, what: str, fault: str = "box-invalid"
) -> list[float]:
    """Return finite numbers, ``count`` of them where given; RecordError for anything else."""
    items = list_or_empty(values)
    if not isinstance(values, list) or (count is not None and len(items) != count):
        many = "numbers" if count is None else f"{count} numbers"
        found = shown(cast("object", values))
        raise RecordError(f"{what} is {found}; expected a list of {many}", fault)
    for item in items:
        if not is_number(item):
            raise RecordError(f"{what} has {shown(item)}; expected finite numbers", fault)
    return [float(item) for item in items]


def number(fields: Mapping[str, Any], name: str, what: str, default: float | None = None) -> float:
    """Return a field that is a finite number."""
    value = fields.get(name, default)
    if not is_number(value):
        raise RecordError(f"{what} has {name}={shown(value)}; expected a number", "box-invalid")
    return float(cast("float", value))


def points(values: object, what: str, least: int = 1) -> list[Point]:
    """Return a list of ``[x, y]``, at least so many."""
    fault = "polygon-invalid"
    items = list_or_empty(values)
    if len(items) < least:
        message = f"{what} has {len(items)} points; expected at least {least}, each [x, y]"
        raise RecordError(message, fault)
    pairs = [numbers(item, 2, f"a point of {what}", fault) for item in items]
    return [(x, y) for x, y in pairs]


def flat_points(values: object, what: str, least: int = 3) -> list[Point]:
    """Return the points of a flat list ``x, y, x, y``."""
    flat = numbers(values, None, what, "polygon-invalid")
    if len(flat) % 2 or len(flat) < 2 * least:
        message = f"{what} is a list of {len(flat)}; expected x, y, x, y of {least} points or more"
        raise RecordError(message, "polygon-invalid")
    return list(zip(flat[::2], flat[1::2], strict=True))


def stated_size(width: object, height: object) -> Size | None:
    """Return a size that an export states; None if it states none."""
    if type(width) is int and type(height) is int and width > 0 and height > 0:
        return min(width, _LARGEST), min(height, _LARGEST)
    return None


def as_text(value: object) -> str:
    """Return an attribute as a text: choices joined, the names of what is ticked."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):  # a box ticked per name
        ticked = cast("dict[str, Any]", value)
        return ", ".join(name for name, is_ticked in ticked.items() if is_ticked)
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in cast("list[Any]", value))
    if value is None or isinstance(value, bool):
        return "" if value is None else ("yes" if value else "no")
    return str(value)


def attributes_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what a region says about itself, without what is empty."""
    return {name: text for name, value in values.items() if (text := as_text(value))}


def is_writable(text: str) -> bool:
    """Whether a text can be stored: JSON and file names may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return how a message shows a value."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
