"""YOLO: a ``data.yaml``, folders of pictures, and a text file per picture with a line per object.

A line is ``class x y width height``, the middle first, or ``class x1 y1 x2 y2 ...``, a polygon of
three points or more (four of a turned box); all are fractions of the width and height of the
upright picture. Where ``data.yaml`` has ``kpt_shape``, key points follow a box.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from vipllava.ingest.importing import outlines
from vipllava.ingest.importing.source import (
    Export,
    ImportFormat,
    ImportingError,
    Outline,
    Size,
    SourceImage,
    SourceRegion,
    flat_points,
    object_or_empty,
    shown,
)
from vipllava.records.fields import list_or_empty
from vipllava.types import RecordError

_SPLITS: Final = ("train", "val", "test")
_ALL: Final = "all"
_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"))
_SLACK: Final = 0.01  # tools round, and some let a box reach out of its picture a little
_NAMES: Final = ("data.yaml", "data.yml", "dataset.yaml")


def read_yolo(export: Export) -> Iterator[SourceImage]:
    """Yield the pictures of one part of a data set, or of all parts."""
    source = export.source
    if source.is_dir():
        named = [source / name for name in _NAMES if (source / name).is_file()]
        listed = named or sorted(source.glob("*.yaml"))[:1]
        if not listed:
            yield from _of_folder(export)
            return
        source = listed[0]
    given = _load_yaml(source)
    names = _names(given.get("names"), source)
    root = source.parent
    if isinstance(given.get("path"), str) and (root / given["path"]).is_dir():
        root = root / given["path"]
    parts = [name for name in _SPLITS if given.get(name)]
    if not parts:
        raise ImportingError(f"{source} has none of {', '.join(_SPLITS)}, which name the pictures")
    split = export.options.split or ("train" if "train" in parts else parts[0])
    if split not in (*parts, _ALL):
        raise ImportingError(f"split={split}: {source} has {', '.join(parts)}, and `all` for all")
    chosen = parts if split == _ALL else [split]
    rest = [part for part in parts if part not in chosen]
    export.facts["split"] = ", ".join(chosen) + (f" (left out: {', '.join(rest)})" if rest else "")
    has_points = given.get("kpt_shape") is not None
    for part in chosen:
        for path in _pictures(given[part], root, source):
            yield _image(path, root, names, has_points, export)


def _of_folder(export: Export) -> Iterator[SourceImage]:
    """Yield the pictures of ``images/`` beside ``labels/`` and ``classes.txt``, as tools export."""
    root = export.source
    classes = root / "classes.txt"
    folder = root / "images"
    if not (classes.is_file() and folder.is_dir()):
        raise ImportingError(
            f"{root} has neither data.yaml nor classes.txt with images/ and labels/: a YOLO data "
            "set has the names of its classes in one of them"
        )
    lines = classes.read_text("utf-8-sig").splitlines()
    names = {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    for path in _pictures("images", root, classes):
        yield _image(path, root, names, False, export)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        return object_or_empty(yaml.safe_load(path.read_text("utf-8-sig")))
    except OSError as error:
        raise ImportingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ImportingError(f"{path} is not YAML: {error}") from error


def _names(value: object, source: Path) -> dict[int, str]:
    given = list_or_empty(value)
    names = dict(enumerate(given)) if given else object_or_empty(value)
    if not names or not all(type(n) is int and isinstance(name, str) for n, name in names.items()):
        raise ImportingError(
            f"{source}: names is {shown(value)}; expected the classes, a list or NUMBER: NAME each"
        )
    return {int(number): name.strip() for number, name in names.items()}


def _pictures(value: object, root: Path, source: Path) -> Iterator[Path]:
    """Yield the pictures of a folder, of a list of pictures in a file, or of several of these."""
    for name in list_or_empty(value) or [value]:
        if not isinstance(name, str):
            raise ImportingError(f"{source} names pictures as {shown(name)}; expected a path")
        place = root / name
        if not place.exists() and name.startswith("../"):  # as Roboflow writes it
            place = root / name.removeprefix("../")
        if place.is_dir():
            found = (path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES)
            yield from sorted(found)
        elif place.is_file():
            for line in place.read_text("utf-8-sig").splitlines():
                if line.strip():
                    beside = place.parent / line.strip()
                    yield beside if beside.exists() else root / line.strip()
        else:
            raise ImportingError(f"{source} names pictures in {place}, which does not exist")


def labels_of(picture: Path) -> Path:
    """Return where the labels of a picture are: ``labels`` for the last ``images`` of its path."""
    parts = list(picture.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _image(
    path: Path, root: Path, names: Mapping[int, str], has_points: bool, export: Export
) -> SourceImage:
    labels = labels_of(path)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    regions: list[SourceRegion] = []
    try:
        lines = labels.read_text("utf-8-sig").splitlines() if labels.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        lines = []
        export.fault("region-invalid", str(labels), f"it cannot be read: {error}")
    for number, line in enumerate(lines, start=1):
        if values := line.split():
            regions.append(_region(f"line {number}", values, names, has_points))
    file = labels.relative_to(root).as_posix() if labels.is_relative_to(root) else str(labels)
    return SourceImage(f"picture {path.name}", file, name, tuple(regions), folders=(root,))


def _region(
    id: str, values: Sequence[str], names: Mapping[int, str], has_points: bool
) -> SourceRegion:
    number = int(float(values[0])) if re.fullmatch(r"\d+(\.0*)?", values[0]) else -1
    return SourceRegion(
        id,
        names.get(number),
        partial(_outline, values[1:], has_points),
        {},
        f"its class is {shown(values[0])}; there are {len(names)} names",
    )


def _outline(values: Sequence[str], has_points: bool, size: Size) -> Outline:
    try:
        given = [float(value) for value in values]
    except ValueError as error:
        raise RecordError(f"it has something that is no number ({error})", "box-invalid") from error
    if has_points:
        given = given[:4]
    if len(given) not in (4, *range(6, len(given) + 1, 2)):
        found = f"{len(given)} numbers behind the class"
        more = "; a confidence belongs to predictions" if len(given) == 5 else ""
        message = f"it has {found}; expected x y width height, or x y of 3 points or more{more}"
        raise RecordError(message, "box-invalid")
    beyond = [value for value in given if not -_SLACK <= value <= 1 + _SLACK]
    if beyond:
        pixels = ": these look like pixels" if max(given) > 2 else ""
        message = f"it has {beyond[0]:g}; coordinates are fractions, 0 to 1{pixels}"
        raise RecordError(message, "box-outside")
    width, height = size
    scaled = [value * (height if place % 2 else width) for place, value in enumerate(given)]
    if len(scaled) == 4:
        x, y, wide, high = scaled
        return outlines.box(x - wide / 2, y - high / 2, wide, high)
    return outlines.polygon(flat_points(scaled, "its polygon"))


def _is_yolo(head: str) -> bool:
    keys = set(re.findall(r"(?m)^(\w+) *:", head))
    return not head.startswith(("{", "[")) and "names" in keys and bool(keys & set(_SPLITS))


def _is_folder(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (*_NAMES, "classes.txt")):
        return True
    return (folder / "labels").is_dir() and (folder / "images").is_dir()


YOLO = ImportFormat(
    "yolo",
    "YOLO",
    read_yolo,
    _is_yolo,
    "upright",
    "ultralytics turns a picture before it counts its fractions",
    is_folder=_is_folder,
    options=("split",),
)
