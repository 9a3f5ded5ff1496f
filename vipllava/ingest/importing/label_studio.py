"""Label Studio: its exports JSON (tasks with annotations) and JSON_MIN (a row per annotation).

Coordinates are per cent of the picture's width and height as the browser showed it: upright, in
browsers since April 2020. A turned rectangle's x, y is its upper left corner after turning.
``original_width`` and ``original_height`` are the browser's, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from vipllava.ingest.importing import outlines
from vipllava.ingest.importing.brush import mask_of_brush
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
    number,
    object_or_empty,
    points,
    shown,
    stated_size,
)
from vipllava.records.fields import is_number, list_or_empty
from vipllava.types import RecordError

_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_OF_A_ROW: Final = frozenset(
    ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")
)
_SHAPES: Final = ("rectangle", "ellipse", "polygon", "keypoint", "brush", "vector")
_LABELS: Final = ("labels", *(f"{shape}labels" for shape in _SHAPES))
_COORDINATES: Final = ("x", "y", "width", "height", "radiusX", "radiusY")
_LEAST_COORDINATES: Final = 4  # of one box
_Result = Mapping[str, Any]


def read_label_studio(export: Export) -> Iterator[SourceImage]:
    """Yield the pictures of an export, a task each."""
    given = load_json(export.source)
    items: list[Any] = [given] if isinstance(given, dict) else list_or_empty(given)
    if not items:
        raise ImportingError(f"{export.source} is no list of tasks; export it as JSON or JSON_MIN")
    folders = (export.source.parent, export.source.parent / "images")
    tasks: list[tuple[str, str, list[list[_Result]]]] = []
    num_guessed = 0
    for position, item in enumerate(map(object_or_empty, items)):
        id = f"task {item.get('id', f'at position {position}')}"
        if isinstance(item.get("data"), dict):
            data = object_or_empty(item["data"])
            made = _of_task(item)
            num_guessed += bool(item.get("predictions")) and not made
        else:
            data = {name: value for name, value in item.items() if name not in _OF_A_ROW}
            made = [_of_row(data)]
        if (name := _picture(data, id, export)) is not None:
            tasks.append((id, name, made))
    if num_guessed:
        export.facts["predictions"] = f"{num_guessed} tasks have nothing else; they are left out"
    _check_not_fractions([value for _, _, made in tasks for value in _coordinates(made)])
    for id, name, made in _newest(tasks, export):
        regions = list(_regions(made))
        sizes = [_stated(result) for result in made]
        yield SourceImage(
            id,
            export.source.name,
            name,
            tuple(regions),
            next((size for size in sizes if size is not None), None),
            folders=folders,
        )


def _of_task(task: Mapping[str, Any]) -> list[list[_Result]]:
    """Return the results of the annotations of a task, the oldest first."""
    listed = task.get("annotations")
    if listed is None:
        listed = task.get("completions")  # as before version 1
    made = [object_or_empty(item) for item in list_or_empty(listed)]
    made = [item for item in made if not (item.get("was_cancelled") or item.get("skipped"))]
    made.sort(key=lambda item: (bool(item.get("ground_truth")), str(item.get("created_at", ""))))
    return [[object_or_empty(r) for r in list_or_empty(item.get("result"))] for item in made]


def _of_row(row: Mapping[str, Any]) -> list[_Result]:
    """Return the results of a row of JSON_MIN, which has them by the name of their tag."""
    return [
        {"from_name": name, "value": value, **_sizes(value)}
        for name, values in row.items()
        for value in map(object_or_empty, list_or_empty(values))
        if value
    ]


def _newest(
    tasks: Sequence[tuple[str, str, list[list[_Result]]]], export: Export
) -> Iterator[tuple[str, str, list[_Result]]]:
    """Yield each task once, with its newest annotation, or that which is called the truth."""
    by_task: dict[tuple[str, str], list[list[_Result]]] = {}
    for id, name, made in tasks:
        by_task.setdefault((id, name), []).extend(made)
    for (id, name), made in by_task.items():
        if len(made) > 1:
            message = f"it has {len(made)} annotations; the newest, or the ground truth, is taken"
            export.fault("annotations-several", f"{export.source.name}, {id}", message)
        yield id, name, made[-1] if made else []


def _picture(data: Mapping[str, Any], id: str, export: Export) -> str | None:
    """Return the field of a task that names a picture."""
    texts = {name: value for name, value in data.items() if isinstance(value, str)}
    found = {
        name: value
        for name, value in texts.items()
        if PurePosixPath(urlsplit(value).path).suffix.lower() in _SUFFIXES
        or PurePosixPath(value).suffix.lower() in _SUFFIXES
    }
    if len(found) == 1:
        return next(iter(found.values()))
    what = f"the fields {', '.join(found)} name pictures" if found else "no field names a picture"
    message = f"{what}; a record has one picture. Its data have: {', '.join(data) or 'nothing'}"
    export.fault("image-missing", f"{export.source.name}, {id}", message)
    return None


def _regions(results: Sequence[_Result]) -> Iterator[SourceRegion]:
    """Yield the regions of an annotation; results of one ``id`` are about the same region."""
    by_region: dict[str, list[_Result]] = {}
    for position, result in enumerate(results):
        by_region.setdefault(str(result.get("id") or f"at position {position}"), []).append(result)
    for id, about in by_region.items():
        placed = [result for result in about if _is_placed(object_or_empty(result.get("value")))]
        if not placed:
            continue  # about the picture as a whole
        labels: list[str] = []
        said: dict[str, Any] = {}
        for result in about:
            value = object_or_empty(result.get("value"))
            labels += [str(label) for name in _LABELS for label in list_or_empty(value.get(name))]
            for name in ("choices", "text", "taxonomy", "number", "rating"):
                if name in value:
                    said[str(result.get("from_name") or name)] = value[name]
        category = ", ".join(dict.fromkeys(label.strip() for label in labels if label.strip()))
        yield SourceRegion(
            f"region {id}",
            category or None,
            partial(_outline, placed[0]),
            attributes_of(said),
            "it has no label",
        )


def _is_placed(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in ("x", "points", "rle", "vertices"))


def _outline(result: _Result, size: Size) -> Outline:
    value = object_or_empty(result.get("value"))
    if turned := result.get("image_rotation") or value.get("image_rotation"):
        message = f"the picture was turned by {turned} degrees in Label Studio; turn it back there"
        raise RecordError(message, "shape-unknown")
    width, height = size
    get = partial(number, value, what="its value")
    if "rle" in value:
        if value.get("format", "rle") != "rle":
            message = f"its mask has the format {shown(value['format'])}; known: rle"
            raise RecordError(message, "shape-unknown")
        return outlines.mask(mask_of_brush(list_or_empty(value["rle"]), width, height))
    if "vertices" in value:
        message = "it is a vector path; draw a polygon, or export its mask"
        raise RecordError(message, "shape-unknown")
    _check_per_cent(value)
    if "points" in value:
        pairs = points(value["points"], "its polygon", 3)
        return outlines.polygon([(x * width / 100, y * height / 100) for x, y in pairs])
    x, y = get("x") * width / 100, get("y") * height / 100
    turned = get("rotation", default=0.0)
    if "radiusX" in value:
        radii = get("radiusX") * width / 100, get("radiusY") * height / 100
        return outlines.ellipse(x, y, *radii, turned)
    if "height" not in value:  # a key point's width is that of its mark
        return outlines.point(x, y, size)
    wide, high = get("width") * width / 100, get("height") * height / 100
    return outlines.turned_box(x, y, wide, high, turned)


def _coordinates(made: Sequence[Sequence[_Result]]) -> Iterator[float]:
    for results in made:
        for result in results:
            yield from _given(object_or_empty(result.get("value")))


def _given(value: Mapping[str, Any]) -> list[float]:
    """Return all coordinates of a value."""
    given: list[Any] = [value.get(name) for name in _COORDINATES]
    given += [n for pair in list_or_empty(value.get("points")) for n in list_or_empty(pair)]
    return [float(n) for n in given if is_number(n)]


def _check_not_fractions(given: Sequence[float]) -> None:
    if len(given) >= _LEAST_COORDINATES and max(given) <= 1:
        raise ImportingError(
            f"all {len(given)} coordinates lie within 0..1: they look like fractions of the "
            "picture, and Label Studio's are per cent, 0 to 100. Multiply them by 100"
        )


def _check_per_cent(value: Mapping[str, Any]) -> None:
    """Refuse what cannot be per cent: pixels, in all likelihood."""
    beyond = [n for n in _given(value) if not -100 <= n <= 200]
    if beyond:
        message = f"it has {beyond[0]:g}; Label Studio's are per cent: these look like pixels"
        raise RecordError(message, "box-outside")


def _sizes(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.get(name) for name in ("original_width", "original_height")}


def _stated(result: _Result) -> Size | None:
    return stated_size(result.get("original_width"), result.get("original_height"))


def _is_label_studio(head: str) -> bool:
    tasks = '"data"' in head and '"result"' in head
    tasks = tasks and ('"annotations"' in head or '"completions"' in head)
    rows = '"annotation_id"' in head and '"annotator"' in head
    return head[:1] in ("[", "{") and (tasks or rows)


LABEL_STUDIO = ImportFormat(
    "label-studio",
    "Label Studio",
    read_label_studio,
    _is_label_studio,
    "upright",
    "browsers turn a picture before Label Studio shows it, since April 2020",
)
