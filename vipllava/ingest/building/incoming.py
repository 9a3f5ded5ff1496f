"""One published record and the files that it names, made into what a shard stores.

Everything that training would stumble over is looked at here, once: the image is decoded whole, the
record is read by its schema. VCR's metadata goes into the record: a shard needs no other file.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from vipllava.ingest.building.annotations import Annotation
from vipllava.ingest.image_format import format_of, same_format
from vipllava.keyed_random import generator_for
from vipllava.records import find_kind, parse_record
from vipllava.records.box_form import box_signs
from vipllava.records.fields import RECORD_VERSION, VERSION_FIELD, check_version
from vipllava.records.image_decode import decode_image
from vipllava.records.json_values import parse_json
from vipllava.shards.manifest import Manifest
from vipllava.shards.sources import is_inside
from vipllava.types import RecordError

UNREADABLE: Final = "input-unreadable"
"""Fault of a file that is there and could not be read: it may be the disk, so it is tried anew."""

_META: Final = "meta_dir"
FILE_FIELDS: Final = ("image", _META)
"""The fields of a record that name a file."""
_WRITTEN_FROM: Final = re.compile(r"^(\./)*(dataset/)?")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_ID: Final = 64
_LONGEST_NAME: Final = 255
"""Bytes of a file's name that file systems take."""
_LONGEST_PATH: Final = 1000  # letters; with the data root a path may have 4096 bytes
_ENCODED: Final = ("data:", "/9j/", "iVBORw0KGgo")  # an address of data; JPEG and PNG in base64
_SHOWN: Final = 80
UNREAD: Final = "unread: "
ROOT: Final = "root: "
"""What is counted over a data set: these with a message or an image root, and signs of boxes."""
_STORED: Final = ("jpg", "png", "webp")
"""Formats that shards hold; others are stored as PNG, which loses nothing."""
FileState = list[int] | None
"""Bytes and nanoseconds of the last change of a file; None if it does not exist."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """One sample, ready to be stored."""

    key: str
    record: Mapping[str, Any]
    image: bytes | None  # the encoded bytes, or None for a text-only record
    extension: str | None  # of the image's real format, or None
    kind: str
    change: str | None = None  # of the image (``jpg is png``, ``gif stored as png``)


def make_key(record: Mapping[str, Any] | None, position: int) -> str:
    """Return a key that is unique in the list and safe in a tar: the record's id and position."""
    identifier = (record or {}).get("id")
    text = _UNSAFE.sub("_", str(identifier)) if isinstance(identifier, (str, int)) else ""
    return f"{text[:_LONGEST_ID].strip('_-') or 'record'}-{position}"


def input_paths(
    name: str, data_root: Path, image_roots: tuple[str, ...], field: str = "image"
) -> list[Path]:
    """Return where a file that a record names may lie, the likeliest place first.

    A record names its image with the image root (``coco/train2017/x.jpg``) or within one
    (``00453/x.jpg``), and its ``meta_dir`` likewise, written from ``./dataset``.

    Raises:
        RecordError: the name leads out of the data root.
    """
    path = _WRITTEN_FROM.sub("", name) if field == _META else name
    shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")
    try:
        longest = max(len(part.encode()) for part in path.split("/"))
    except UnicodeEncodeError as error:
        raise RecordError(
            f"field `{field}` is {shown}, with half of a character (a lone surrogate); rename the "
            "file, or correct the record"
        ) from error
    if longest > _LONGEST_NAME or len(path) > _LONGEST_PATH or path.startswith(_ENCODED):
        raise RecordError(
            f"field `{field}` is {shown}, {len(name)} letters; expected a path inside the data "
            "root. If it is an image as base64 text, decode it into a file and name that"
        )
    if not path or "\0" in path or not is_inside(path):
        raise RecordError(f"field `{field}` is {shown}; expected a path inside the data root")
    whole = PurePosixPath(path)
    within = [root / whole for root in map(PurePosixPath, image_roots)]
    named = not image_roots or any(whole.is_relative_to(root) for root in image_roots)
    places = [whole, *within] if named else [*within, whole]
    return [data_root / place for place in dict.fromkeys(places)]


def input_names(
    record: Mapping[str, Any] | None, data_root: Path, image_roots: tuple[str, ...]
) -> list[str]:
    """Return all files that a record may mean, relative to the data root."""
    paths: list[Path] = []
    for field in FILE_FIELDS:
        if isinstance(name := (record or {}).get(field), str):
            with suppress(RecordError):
                paths += input_paths(name, data_root, image_roots, field)
    return [os.fspath(path.relative_to(data_root)) for path in paths]


def input_states(names: Iterable[str], data_root: Path) -> dict[str, FileState]:
    """Return the states of files: they change when somebody repairs them."""
    states: dict[str, FileState] = dict.fromkeys(names)
    for name in states:
        with suppress(OSError, ValueError):
            stat = (data_root / name).stat()
            states[name] = [stat.st_size, stat.st_mtime_ns]
    return states


def ingest(item: Annotation, manifest: Manifest, data_root: Path, noted: Counter[str]) -> Ingested:
    """Read, check and complete one record; count what is to be noted of the data set as a whole.

    Raises:
        RecordError: it is no record, breaks its schema, or a file it names is missing or broken.
    """
    key = make_key(item.record, item.position)
    where = f"{manifest.name}/{key}"
    if item.record is None:
        raise RecordError(f"{where}: item {item.position} of the list {item.problem}")
    check_version(item.record, where)
    record = dict(item.record)
    kind = find_kind(record, manifest.record_kind, False)
    given = kind.given(record)
    noted.update(f"{UNREAD}{message}" for message in kind.unread(given))
    try:
        image, extension, change, size = _read_image(record, manifest, data_root, key, noted)
        _add_metadata(record, manifest, data_root)
    except RecordError as error:
        raise error if str(error).startswith(where) else error.at(where) from error
    if size is not None:
        noted.update(box_signs(kind.outlines(kind.given(record)), size))
    record[VERSION_FIELD] = RECORD_VERSION
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, or half of a surrogate pair
        raise RecordError(f"{where}: the record cannot be stored as JSON ({error})") from error
    sample = parse_record(
        record,
        key=key,
        dataset=manifest.name,
        image=image,
        kind=manifest.record_kind,
        rng=generator_for("build", manifest.name, key),
        upright=manifest.apply_exif_orientation,
    )
    return Ingested(sample.key, record, image, extension, kind.name, change)


def _read_image(
    record: Mapping[str, Any], manifest: Manifest, data_root: Path, key: str, noted: Counter[str]
) -> tuple[bytes | None, str | None, str | None, tuple[int, int] | None]:
    """Return the image's bytes, real extension, what was changed, and width and height."""
    if record.get("image") is None:
        return None, None, None, None
    name, path, data = _read_input(record, "image", manifest, data_root)
    within = path.relative_to(data_root)
    noted.update(f"{ROOT}{root}" for root in manifest.image_roots if within.is_relative_to(root))
    decoded = decode_image(data, f"{manifest.name}/{key}", upright=manifest.apply_exif_orientation)
    real = format_of(data)
    if real not in _STORED:
        buffer = io.BytesIO()
        decoded.save(buffer, "PNG")
        return buffer.getvalue(), "png", f"{real or 'other format'} stored as png", decoded.size
    named = PurePosixPath(name).suffix.lower().removeprefix(".")
    change = None if same_format(named, real) else f"{named or 'no extension'} is {real}"
    return data, real, change, decoded.size


def _add_metadata(record: dict[str, Any], manifest: Manifest, data_root: Path) -> None:
    """Put the JSON that ``meta_dir`` names under ``meta``."""
    if record.get(_META) is None or record.get("meta") is not None:
        return
    name, _, data = _read_input(record, _META, manifest, data_root)
    try:
        meta: Any = parse_json(data)
        if not isinstance(meta, dict):
            found = type(meta).__name__
            raise ValueError(f"holds {found}; expected an object with `boxes` and `segms`")
    except ValueError as error:
        raise RecordError(
            f"metadata {name} cannot be used ({error}); get the file again", "meta-corrupt"
        ) from error
    record["meta"] = cast("dict[str, Any]", meta)


def _read_input(
    record: Mapping[str, Any], field: str, manifest: Manifest, data_root: Path
) -> tuple[str, Path, bytes]:
    """Return name, first place that has it, and content of the file that a field names."""
    name = record[field]
    if not isinstance(name, str):
        raise RecordError(f"field `{field}` is {name!r}; expected one path, a text")
    what = f"{'metadata' if field == _META else 'image'} {name}"
    places = input_paths(name, data_root, manifest.image_roots, field)
    for path in places:
        try:
            return name, path, path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RecordError(f"{what} cannot be read: {error}", UNREADABLE) from error
    looked = ", ".join(os.fspath(path.relative_to(data_root)) for path in places[:3])
    more = f" and {len(places) - 3} more places" if len(places) > 3 else ""
    raise RecordError(
        f"{what} is missing: looked for {looked}{more} under {data_root}",
        "meta-missing" if field == _META else "image-missing",
    )
