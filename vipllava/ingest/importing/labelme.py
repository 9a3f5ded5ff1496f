"""LabelMe: one JSON file per picture, beside it, of versions 4 and 5 (and 3 and 6, if alike).

``shapes`` have a ``label``, ``points`` in pixels of the upright picture, a ``shape_type`` (polygon
where none is said) and, for masks, ``mask``: a PNG in base64 of the box between their two points.
A rectangle's two points are opposite corners in the order in which they were drawn. Shapes of one
``label`` and ``group_id`` are parts of one object.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from vipllava.ingest.importing import outlines
from vipllava.ingest.importing.source import (
    Export,
    ImportFormat,
    ImportingError,
    Outline,
    Size,
    SourceImage,
    SourceRegion,
    attributes_of,
    load_json,
    object_or_empty,
    points,
    shown,
    stated_size,
)
from vipllava.records.fields import list_or_empty
from vipllava.records.image_decode import MAX_PIXELS
from vipllava.types import Point, RecordError
from vipllava.visual_prompts.rle import Bits

_SHAPES: Final = (
    "rectangle", "polygon", "circle", "point", "line", "linestrip", "mask", "oriented_rectangle",
)  # fmt: skip


def read_labelme(export: Export) -> Iterator[SourceImage]:
    """Yield the pictures of a file, or of all files in a folder and the folders in it."""
    single = export.source.is_file()
    files = [export.source] if single else sorted(export.source.rglob("*.json"))
    if not files:
        raise ImportingError(f"{export.source} holds no *.json; LabelMe writes one per picture")
    num_found = 0
    for path in files:
        file = path.name if single else path.relative_to(export.source).as_posix()
        given = object_or_empty(load_json(path))
        if not isinstance(given.get("shapes"), list) or "imagePath" not in given:
            if single:
                raise ImportingError(f"{path} has no `shapes` and `imagePath`: it is not LabelMe's")
            export.fault("file-ignored", file, "it has no `shapes` and `imagePath`")
            continue
        num_found += 1
        yield _image(path, file, given)
    if not num_found:
        raise ImportingError(f"no *.json in {export.source} has `shapes` and `imagePath`")


def _image(path: Path, file: str, given: Mapping[str, Any]) -> SourceImage:
    name = given["imagePath"]
    name = name.replace("\\", "/") if isinstance(name, str) else ""
    data = given.get("imageData")
    return SourceImage(
        f"picture {name}",
        file,
        name or f"{path.stem}.png",
        tuple(_regions(list_or_empty(given["shapes"]))),
        stated_size(given.get("imageWidth"), given.get("imageHeight")),
        partial(_embedded, data) if isinstance(data, str) and data else None,
        (path.parent,),
    )


def _embedded(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise RecordError(f"its imageData is no base64 ({error})", "image-corrupt") from error


def _regions(shapes: Sequence[Any]) -> Iterator[SourceRegion]:
    """Yield a region per shape, or per group of shapes of one label."""
    groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for number, value in enumerate(shapes):
        shape = object_or_empty(value)
        group = shape.get("group_id")
        key = (number,) if group is None else (str(shape.get("label")), str(group))
        groups.setdefault(key, []).append((number, shape))
    for members in groups.values():
        shape, label = members[0][1], members[0][1].get("label")
        said = {"description": shape.get("description"), "group_id": shape.get("group_id")}
        flags = {name: value for name, value in object_or_empty(shape.get("flags")).items()}
        numbers = ", ".join(str(number) for number, _ in members)
        yield SourceRegion(
            f"shape {numbers}",
            label.strip() or None if isinstance(label, str) else None,
            partial(_joined, [shape for _, shape in members]),
            attributes_of({**flags, **said}),
            f"its label is {shown(label)}",
        )


def _joined(shapes: Sequence[Mapping[str, Any]], size: Size) -> Outline:
    parts = [_outline(shape, size) for shape in shapes]
    if len(parts) == 1:
        outline, bits = parts[0]
        return outline if bits is None else outlines.mask(bits)
    return outlines.joined([part for part, _ in parts], [bits for _, bits in parts], size)


def _outline(shape: Mapping[str, Any], size: Size) -> tuple[Outline, Bits | None]:
    """Return the outline of a shape; of a mask its pixels."""
    kind = shape.get("shape_type") or "polygon"
    what = f"its {kind}"
    found = points(shape.get("points"), what)
    match kind:
        case "polygon" | "oriented_rectangle":
            return outlines.polygon(points(shape["points"], what, 3)), None
        case "rectangle":
            return outlines.corners(*_two(found, what)), None
        case "circle":
            middle, rim = _two(found, what)
            radius = math.dist(middle, rim)
            return outlines.ellipse(*middle, radius, radius), None
        case "point":
            return outlines.point(*found[0], size), None
        case "line" | "linestrip":
            return outlines.line(found), None
        case "mask":
            (x, y), _ = _two(found, what)
            patch = _patch(shape.get("mask"))
            return Outline(), outlines.placed_mask(patch, round(x), round(y), size)
        case _:
            message = f"its shape_type is {shown(kind)}; known: {', '.join(_SHAPES)}"
            raise RecordError(message, "shape-unknown")


def _two(found: Sequence[Point], what: str) -> tuple[Point, Point]:
    if len(found) != 2:
        raise RecordError(f"{what} has {len(found)} points; expected 2", "polygon-invalid")
    return found[0], found[1]


def _patch(mask: object) -> Bits:
    """Return the pixels of a mask's box."""
    try:
        if not isinstance(mask, str):
            raise ValueError(f"{shown(mask)} is no text")
        with Image.open(io.BytesIO(base64.b64decode(mask, validate=True)), formats=("PNG",)) as png:
            if png.width * png.height > MAX_PIXELS:
                raise ValueError(f"{png.width} x {png.height} pixels are too many")
            return np.asarray(png).astype(np.bool_).reshape(png.height, png.width, -1)[..., 0]
    except (OSError, ValueError, SyntaxError) as error:
        message = f"its mask is no PNG in base64 ({error}); export it again"
        raise RecordError(message, "mask-invalid") from error


def _is_labelme(head: str) -> bool:
    names = ("shapes", "imagePath", "imageData", "imageHeight")
    return head.startswith("{") and sum(f'"{name}"' in head for name in names) >= 2


def _is_folder(folder: Path) -> bool:
    """Whether the first JSON file in a folder is one of LabelMe's."""
    first = min(folder.glob("*.json"), default=None)
    return first is not None and _is_labelme(first.read_text("utf-8", "replace"))


LABELME = ImportFormat(
    "labelme",
    "LabelMe",
    read_labelme,
    _is_labelme,
    "upright",
    "LabelMe turns a picture before it shows it",
    is_folder=_is_folder,
)
