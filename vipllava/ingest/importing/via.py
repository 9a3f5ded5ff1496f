"""VIA, the VGG Image Annotator: projects and annotations of version 2 (JSON, CSV), version 3.

Coordinates are pixels of what the browser showed: upright, in browsers since April 2020. There is
no category, only attributes of regions with names of the user's; of several, one has to be named.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from vipllava.ingest.importing import outlines
from vipllava.ingest.importing.source import (
    Export,
    ImportFormat,
    ImportingError,
    Outline,
    Size,
    SourceImage,
    SourceRegion,
    as_text,
    attributes_of,
    flat_points,
    load_json,
    number,
    numbers,
    object_or_empty,
    shown,
)
from vipllava.ingest.importing.templates import CATEGORY
from vipllava.records.fields import list_or_empty
from vipllava.types import Point, RecordError

_COLUMNS: Final = ("filename", "region_shape_attributes", "region_attributes")
_PICTURE: Final = 2
"""The ``type`` of a file of version 3 that is an image."""


def read_via(export: Export) -> Iterator[SourceImage]:
    """Yield the pictures of a file, whatever version of VIA wrote it."""
    prefixes: list[str] = []  # of the pictures' names, as the user told VIA
    if export.source.suffix.lower() == ".csv":
        listed = _of_csv(export)
    else:
        given = object_or_empty(load_json(export.source))
        if isinstance(given.get("metadata"), dict) and isinstance(given.get("file"), dict):
            listed = _of_version_3(given, export)
            file = object_or_empty(object_or_empty(given.get("config")).get("file"))
            prefixes = [as_text(text) for text in object_or_empty(file.get("loc_prefix")).values()]
        else:
            listed = _of_version_2(given, export)
            core = object_or_empty(object_or_empty(given.get("_via_settings")).get("core"))
            prefixes = [as_text(core.get("default_filepath"))]
    found = list(listed)
    names = list(
        dict.fromkeys(name for image in found for region in image[2] for name in region.attributes)
    )
    category = _category(names, export)
    here = export.source.parent
    folders = (here, here / "images", *(here / prefix for prefix in prefixes))
    for id, name, regions in found:
        yield SourceImage(
            id,
            export.source.name,
            name,
            tuple(_with_category(region, category) for region in regions),
            folders=folders,
        )


_Listed = tuple[str, str, list[SourceRegion]]


def _category(names: Sequence[str], export: Export) -> str | None:
    """Return the attribute that ``{category}`` means: named by the user, so called, or the only."""
    chosen = export.options.category
    if chosen is not None and chosen not in names:
        listed = ", ".join(names) or "none"
        raise ImportingError(
            f"category={chosen}: no region has this attribute; there are: {listed}"
        )
    if chosen is None and (len(names) == 1 or CATEGORY in names):
        chosen = CATEGORY if CATEGORY in names else names[0]
    if chosen is not None:
        export.facts["category"] = f"the attribute `{chosen}`"
    return chosen


def _with_category(region: SourceRegion, category: str | None) -> SourceRegion:
    why = f"its attribute `{category}` is empty"
    if category is None:
        why = "regions have several attributes, or none; name the one that is meant: category=NAME"
    value = region.attributes.get(category or "")
    return SourceRegion(region.id, value, region.outline, region.attributes, why)


# Version 2.


def _of_version_2(given: Mapping[str, Any], export: Export) -> Iterator[_Listed]:
    """Yield picture by picture of a project (``_via_img_metadata``) or of annotations alone."""
    images = object_or_empty(given.get("_via_img_metadata")) or given
    entries = {key: object_or_empty(value) for key, value in images.items()}
    entries = {key: entry for key, entry in entries.items() if "regions" in entry}
    if not entries:
        raise ImportingError(
            f"{export.source} has no pictures with `filename` and `regions`: it is not VIA's"
        )
    for entry in entries.values():
        name = entry.get("filename")
        by_number = object_or_empty(entry["regions"])  # as version 1 wrote them
        regions = list(by_number.values()) or list_or_empty(entry["regions"])
        about = attributes_of(object_or_empty(entry.get("file_attributes")))
        yield (
            f"picture {name}",
            name if isinstance(name, str) else "",
            [
                _region(position, object_or_empty(item), about)
                for position, item in enumerate(regions)
            ],
        )


def _of_csv(export: Export) -> Iterator[_Listed]:
    """Yield picture by picture of a table with a line per region."""
    by_name: dict[str, list[SourceRegion]] = {}
    try:
        with export.source.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            rows.fieldnames = [name.lstrip("#").strip() for name in rows.fieldnames or ()]
            if missing := [name for name in _COLUMNS if name not in rows.fieldnames]:
                raise ImportingError(
                    f"{export.source} has no column {missing[0]}; VIA's tables have {_COLUMNS}"
                )
            for row in rows:
                regions = by_name.setdefault(row["filename"], [])
                shape = _json_cell(row, "region_shape_attributes", rows.line_num, export)
                if not shape:
                    continue  # a picture without regions has a line, too
                item = {
                    "shape_attributes": shape,
                    "region_attributes": _json_cell(
                        row, "region_attributes", rows.line_num, export
                    ),
                }
                about = _json_cell(row, "file_attributes", rows.line_num, export)
                regions.append(_region(len(regions), item, attributes_of(about)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImportingError(f"{export.source} cannot be read as a table: {error}") from error
    for name, regions in by_name.items():
        yield f"picture {name}", name, regions


def _json_cell(row: Mapping[str, str | None], name: str, line: int, export: Export) -> Any:
    try:
        return object_or_empty(json.loads(row.get(name) or "{}"))
    except ValueError as error:
        message = f"{export.source}, line {line}: {name} is no JSON ({error})"
        raise ImportingError(message) from error


def _region(position: int, item: Mapping[str, Any], about: Mapping[str, str]) -> SourceRegion:
    attributes = attributes_of(object_or_empty(item.get("region_attributes")))
    shape = object_or_empty(item.get("shape_attributes"))
    id = f"region {position}"
    return SourceRegion(id, None, partial(_outline_2, shape), {**about, **attributes})


def _outline_2(shape: Mapping[str, Any], size: Size) -> Outline:
    name = shape.get("name")
    what = f"its {name}"
    get = partial(number, shape, what=what)
    match name:
        case "rect":
            return outlines.box(get("x"), get("y"), get("width"), get("height"))
        case "circle":
            return outlines.ellipse(get("cx"), get("cy"), get("r"), get("r"))
        case "ellipse":
            turned = math.degrees(get("theta", default=0.0))
            return outlines.ellipse(get("cx"), get("cy"), get("rx"), get("ry"), turned)
        case "point":
            return outlines.point(get("cx"), get("cy"), size)
        case "polygon":
            return outlines.polygon(_all_points(shape, what, 3))
        case "polyline":
            return outlines.line(_all_points(shape, what, 2))
        case _:
            known = "rect, circle, ellipse, point, polygon, polyline"
            raise RecordError(f"its shape is {shown(name)}; known: {known}", "shape-unknown")


def _all_points(shape: Mapping[str, Any], what: str, least: int) -> list[Point]:
    xs = numbers(shape.get("all_points_x"), None, f"all_points_x of {what}", "polygon-invalid")
    ys = numbers(shape.get("all_points_y"), None, f"all_points_y of {what}", "polygon-invalid")
    if len(xs) != len(ys) or len(xs) < least:
        message = f"{what} has {len(xs)} x and {len(ys)} y; expected as many, {least} or more"
        raise RecordError(message, "polygon-invalid")
    return list(zip(xs, ys, strict=True))


# Version 3.


def _of_version_3(given: Mapping[str, Any], export: Export) -> Iterator[_Listed]:
    """Yield picture by picture: a view shows a file, and metadata belong to a view."""
    files, views = object_or_empty(given["file"]), object_or_empty(given.get("view"))
    attributes = object_or_empty(given.get("attribute"))
    by_view: dict[str, list[SourceRegion]] = {}
    for key, value in object_or_empty(given["metadata"]).items():
        item = object_or_empty(value)
        view = str(item.get("vid"))
        if not item.get("xy"):
            continue  # about a picture as a whole, or a stretch of time
        if view not in views:
            message = f"its view is {view!r}, which the project does not have"
            export.fault("image-unknown", f"{export.source.name}, region {key}", message)
            continue
        values = _values(object_or_empty(item.get("av")), attributes)
        outline = partial(_outline_3, list_or_empty(item["xy"]), bool(item.get("z")))
        by_view.setdefault(view, []).append(SourceRegion(f"region {key}", None, outline, values))
    for key, value in views.items():
        shown_files = [str(id) for id in list_or_empty(object_or_empty(value).get("fid_list"))]
        regions = by_view.get(key, [])
        file = object_or_empty(files.get(shown_files[0])) if len(shown_files) == 1 else {}
        if file.get("type") != _PICTURE:
            if regions:
                where = f"{export.source.name}, view {key}"
                message = f"it shows {len(shown_files)} files or a video; expected one picture"
                export.fault("image-unknown", where, message)
            continue
        name = file.get("src") or file.get("fname")
        yield f"picture {file.get('fname')}", name if isinstance(name, str) else "", regions


def _values(given: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return attributes by name; of choices the text, where ``av`` has their numbers."""
    values: dict[str, str] = {}
    for key, value in given.items():
        attribute = object_or_empty(attributes.get(key))
        options = object_or_empty(attribute.get("options"))
        text = as_text(value)
        if options:
            chosen = [part.strip() for part in text.split(",")]
            text = ", ".join(as_text(options.get(part, part)) for part in chosen if part)
        if text:
            values[str(attribute.get("aname") or key)] = text
    return values


def _outline_3(xy: Sequence[Any], in_time: bool, size: Size) -> Outline:
    if in_time:
        raise RecordError("it belongs to a time of a video", "shape-unknown")
    if not xy or type(xy[0]) is not int:
        message = f"its xy is {shown(xy)}; expected the number of its shape and coordinates"
        raise RecordError(message, "shape-unknown")
    kind, given = xy[0], numbers(list(xy[1:]), None, "its xy")
    lengths = {1: 2, 2: 4, 3: 3, 4: 4, 5: 4, 8: 8, 9: 6}
    if kind in lengths and len(given) < lengths[kind]:
        message = f"its xy is {shown(xy)}; expected {lengths[kind]} numbers behind the shape"
        raise RecordError(message, "box-invalid")
    match kind:
        case 1:
            return outlines.point(given[0], given[1], size)
        case 2:
            return outlines.box(*given[:4])
        case 3:
            return outlines.ellipse(given[0], given[1], given[2], given[2])
        case 4:
            turned = math.degrees(given[4]) if len(given) > 4 else 0.0
            x, y, rx, ry = given[:4]
            return outlines.ellipse(x, y, rx, ry, turned)
        case 5 | 6:
            return outlines.line(flat_points(given, "its line", 2))
        case 7:
            return outlines.polygon(flat_points(given, "its polygon"))
        case 8:  # the four extreme points of an object
            xs, ys = given[0:8:2], given[1:8:2]
            return Outline((min(xs), min(ys), max(xs), max(ys)))
        case 9:
            a, b, c = flat_points(given[:6], "its circle")
            return outlines.circle_through(a, b, c)
        case _:
            message = f"its shape is number {shown(kind)}; known: 1 to 9"
            raise RecordError(message, "shape-unknown")


def _is_via(head: str) -> bool:
    if "region_shape_attributes" in head.partition("\n")[0]:
        return True
    if not head.startswith("{"):
        return False
    version_3 = '"project"' in head and any(f'"{n}"' in head for n in ("vid_list", "loc_prefix"))
    names = ("_via_settings", "_via_img_metadata", "shape_attributes")
    return version_3 or any(f'"{name}"' in head for name in names)


VIA = ImportFormat(
    "via",
    "VIA",
    read_via,
    _is_via,
    "upright",
    "browsers turn a picture before VIA shows it, since April 2020",
    options=("category",),
)
