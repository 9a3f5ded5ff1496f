"""One published record and the files that it names, made into what a shard stores.

Everything that training would stumble over is looked at here, once: the image is decoded whole,
the record is read by its schema. What the sample needs from other files (VCR's metadata) goes into
the record, so that a shard needs nothing beside it.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from vipllava.ingest.building.annotations import Annotation
from vipllava.keyed_random import generator_for
from vipllava.records import AUTO, kind_of, parse_record
from vipllava.records.image_decode import decode_image
from vipllava.records.version import RECORD_VERSION, VERSION_FIELD, check_version
from vipllava.shards.manifest import Manifest
from vipllava.shards.sources import is_inside
from vipllava.types import RecordError

UNREADABLE: Final = "input-unreadable"
"""Fault of a file that is there and could not be read: it may be the disk, so it is tried anew."""

_META: Final = "meta_dir"
_WRITTEN_FROM: Final = re.compile(r"(\./)*(dataset/)?")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_ID: Final = 64
_SIGNATURES: Final[tuple[tuple[re.Pattern[bytes], str], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"BM"), "bmp"),
)
_STORED: Final = ("jpg", "png", "webp")
"""Formats that shards hold; others are stored as PNG, which loses nothing."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """One sample, ready to be stored.

    Attributes:
        key: unique within the data set.
        record: the JSON object.
        image: the encoded bytes, or None for a text-only record.
        extension: of the image's real format, or None.
        kind: the record's kind.
        change: what was done to the image (``jpg is png``, ``gif stored as png``), or None.
    """

    key: str
    record: Mapping[str, Any]
    image: bytes | None
    extension: str | None
    kind: str
    change: str | None = None


def make_key(record: Mapping[str, Any] | None, position: int) -> str:
    """Return a key that is unique in the list and safe in a tar: the record's id and position."""
    identifier = record.get("id") if record is not None else None
    text = _UNSAFE.sub("_", str(identifier)) if isinstance(identifier, (str, int)) else ""
    return f"{text[:_LONGEST_ID].strip('_-') or 'record'}-{position}"


def image_paths(image: str, data_root: Path, image_roots: tuple[str, ...]) -> list[Path]:
    """Return where a record's image may lie, the likeliest place first.

    A record names its image with the image root (``coco/train2017/x.jpg``) or within one
    (``00453/x.jpg``).

    Raises:
        RecordError: the name leads out of the data root.
    """
    if not image or "\0" in image or not is_inside(image):
        raise RecordError(f"field `image` is {image!r}; expected a path inside the data root")
    name = PurePosixPath(image)
    whole = [PurePosixPath(root) for root in image_roots]
    within = [root / name for root in whole]
    named = not whole or any(name.is_relative_to(root) for root in whole)
    places = [name, *within] if named else [*within, name]
    return [data_root / place for place in dict.fromkeys(places)]


def metadata_paths(meta: str, data_root: Path, image_roots: tuple[str, ...]) -> list[Path]:
    """Return where a ``meta_dir`` (written from ``./dataset``) may lie, likeliest first.

    Raises:
        RecordError: the name leads out of the data root.
    """
    match = _WRITTEN_FROM.match(meta)
    name = meta[match.end() :] if match else meta
    try:
        return image_paths(name, data_root, image_roots)
    except RecordError:
        raise RecordError(
            f"field `{_META}` is {meta!r}; expected a path written from ./dataset, inside the "
            "data root"
        ) from None


FileState = list[int] | None
"""Bytes and nanoseconds of the last change of a file; None if it does not exist."""


def input_names(
    record: Mapping[str, Any] | None, data_root: Path, image_roots: tuple[str, ...]
) -> list[str]:
    """Return all files that a record may mean, relative to the data root."""
    paths = _input_paths(record or {}, data_root, image_roots)
    return [os.fspath(path.relative_to(data_root)) for path in paths]


def input_states(names: Iterable[str], data_root: Path) -> dict[str, FileState]:
    """Return the states of files: they change when somebody repairs them."""
    states: dict[str, FileState] = {}
    for name in names:
        try:
            stat = (data_root / name).stat()
        except (OSError, ValueError):
            states[name] = None
        else:
            states[name] = [stat.st_size, stat.st_mtime_ns]
    return states


def _input_paths(
    record: Mapping[str, Any], data_root: Path, image_roots: tuple[str, ...]
) -> Iterator[Path]:
    for field, find in (("image", image_paths), (_META, metadata_paths)):
        name = record.get(field)
        if isinstance(name, str):
            try:
                yield from find(name, data_root, image_roots)
            except RecordError:
                continue


def ingest(item: Annotation, manifest: Manifest, data_root: Path) -> Ingested:
    """Read, check and complete one record.

    Args:
        item: from the annotation list; not changed.
        manifest: gives the image roots and the record kind.
        data_root: folder that paths are relative to.

    Raises:
        RecordError: it is no record, breaks its schema, or a file it names is missing or broken.
    """
    key = make_key(item.record, item.position)
    where = f"{manifest.name}/{key}"
    if item.record is None:
        raise RecordError(f"{where}: item {item.position} of the list {item.problem}")
    check_version(item.record, where)
    record = dict(item.record)
    try:
        image, extension, change = _read_image(record, manifest, data_root, key)
        _add_metadata(record, manifest, data_root)
    except RecordError as error:
        raise error if str(error).startswith(where) else error.at(where) from error
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
    )
    kind = kind_of(record) if manifest.record_kind == AUTO else manifest.record_kind
    return Ingested(sample.key, record, image, extension, kind, change)


def _read_image(
    record: Mapping[str, Any], manifest: Manifest, data_root: Path, key: str
) -> tuple[bytes | None, str | None, str | None]:
    """Return the image's bytes, real extension, and what was changed."""
    if "image" not in record:
        return None, None, None
    name = record["image"]
    if not isinstance(name, str):
        raise RecordError(f"field `image` is {name!r}; expected one path, a text")
    places = image_paths(name, data_root, manifest.image_roots)
    data = _read_first(places, f"picture {name}", "image-missing", data_root)
    decoded = decode_image(data, f"{manifest.name}/{key}")
    real = next((e for signature, e in _SIGNATURES if signature.match(data)), None)
    if real not in _STORED:
        buffer = io.BytesIO()
        decoded.save(buffer, "PNG")
        return buffer.getvalue(), "png", f"{real or 'other format'} stored as png"
    named = PurePosixPath(name).suffix.lower().removeprefix(".")
    same = real == ("jpg" if named == "jpeg" else named)
    return data, real, None if same else f"{named or 'no extension'} is {real}"


def _add_metadata(record: dict[str, Any], manifest: Manifest, data_root: Path) -> None:
    """Put the JSON that ``meta_dir`` names under ``meta``."""
    name = record.get(_META)
    if name is None or "meta" in record:
        return
    if not isinstance(name, str):
        raise RecordError(f"field `{_META}` is {name!r}; expected one path, a text")
    places = metadata_paths(name, data_root, manifest.image_roots)
    data = _read_first(places, f"metadata {name}", "meta-missing", data_root)
    try:
        meta: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"metadata {name} is not JSON ({error}); get the file again", "meta-corrupt"
        ) from error
    if not isinstance(meta, dict):
        raise RecordError(
            f"metadata {name} holds {type(meta).__name__}; expected an object with `boxes` and "
            "`segms`",
            "meta-corrupt",
        )
    record["meta"] = cast("dict[str, Any]", meta)


def _read_first(places: list[Path], what: str, fault: str, data_root: Path) -> bytes:
    """Return the content of the first place that exists."""
    for path in places:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RecordError(f"{what} cannot be read: {error}", UNREADABLE) from error
    looked = ", ".join(os.fspath(path.relative_to(data_root)) for path in places[:3])
    more = f" and {len(places) - 3} more places" if len(places) > 3 else ""
    raise RecordError(f"{what} is missing: looked for {looked}{more} under {data_root}", fault)
