"""The sidecar index of a tar: where each member lies, and how to notice that it changed.

``NAME.index.npz`` holds one row per sample (see :class:`ShardIndex`) and ``meta``, a JSON text
with the format version and what identifies the tar. About 50 bytes a sample and the key.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt

from vipllava.data.image_decode import image_size
from vipllava.types import RecordError, VipLlavaError

log = logging.getLogger(__name__)

INDEX_VERSION: Final = 1
IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
_NO_IMAGE: Final = -1
_HEAD_BYTES: Final = 4096
_BLOCK: Final = 512
_MEMBER: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: cut at the first dot


class ShardError(VipLlavaError):
    """A shard or its index is missing, damaged, or not what the manifest says."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One tar's samples, column by column; every array has one row per sample.

    Attributes:
        tar_size: bytes of the whole tar.
        head_crc: CRC-32 of the tar's first 4096 bytes.
        key_bytes: uint8, all keys one after the other.
        key_ends: int64, where each key ends in ``key_bytes``.
        record_offset, record_size, record_crc: place, bytes and CRC-32 of the JSON member.
        image_offset, image_size, image_crc: the same of the picture; offset -1 without one.
        image_extension: int8, index into ``IMAGE_EXTENSIONS``; -1 without a picture.
        picture_size: int32 [samples, 2], width and height in pixels, upright; 0 if unreadable.
    """

    tar_size: int
    head_crc: int
    key_bytes: npt.NDArray[np.uint8]
    key_ends: npt.NDArray[np.int64]
    record_offset: npt.NDArray[np.int64]
    record_size: npt.NDArray[np.int32]
    record_crc: npt.NDArray[np.uint32]
    image_offset: npt.NDArray[np.int64]
    image_size: npt.NDArray[np.int32]
    image_crc: npt.NDArray[np.uint32]
    image_extension: npt.NDArray[np.int8]
    picture_size: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.key_ends)

    def key(self, row: int) -> str:
        """Return the key of one sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_ends[row])].tobytes().decode()

    def iter_keys(self) -> Iterator[str]:
        """Yield the keys in the tar's order."""
        return map(self.key, range(len(self)))

    def has_image(self, row: int) -> bool:
        """Whether the sample has a picture."""
        return int(self.image_offset[row]) != _NO_IMAGE

    def extension(self, row: int) -> str | None:
        """Return the picture's extension, or None for a text-only sample."""
        return IMAGE_EXTENSIONS[int(self.image_extension[row])] if self.has_image(row) else None


_COLUMNS: Final[dict[str, Any]] = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "record_offset": np.int64,
    "record_size": np.int32,
    "record_crc": np.uint32,
    "image_offset": np.int64,
    "image_size": np.int32,
    "image_crc": np.uint32,
    "image_extension": np.int8,
    "picture_size": np.int32,
}


def index_path(tar: Path) -> Path:
    """Return where the index of ``tar`` lies."""
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.index.npz")


@dataclass(frozen=True, slots=True)
class _Member:
    extension: str
    offset: int
    size: int
    crc: int
    width: int = 0
    height: int = 0


def build_index(path: Path, *, name: str | None = None) -> ShardIndex:
    """Read a tar from start to end and index it.

    Args:
        path: the tar.
        name: the tar's final name, for messages, where ``path`` is a temporary one.

    Raises:
        ShardError: the tar is missing, truncated, broken or empty, a sample has no record or two
            pictures, a key occurs twice, or a record is no JSON object.
    """
    where = path.with_name(name) if name else path
    samples: dict[str, dict[str, _Member]] = {}
    ignored: set[str] = set()
    try:
        with path.open("rb") as file:
            last = None
            for key, member in _walk(file, where):
                if member.extension not in ("json", *IMAGE_EXTENSIONS):
                    ignored.add(member.extension)
                    continue
                if key != last and key in samples:
                    raise ShardError(
                        f"{where}: key `{key}` occurs twice, or its members are not side by side; "
                        "build the shard again with unique keys"
                    )
                last = key
                members = samples.setdefault(key, {})
                kind = "record" if member.extension == "json" else "image"
                if kind in members:
                    raise ShardError(f"{where}: sample `{key}` has two members of kind {kind}")
                members[kind] = member
            file.seek(0)
            head_crc = zlib.crc32(file.read(_HEAD_BYTES))
            tar_size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ShardError(f"{where} cannot be read: {error}") from error
    if ignored:
        log.warning("%s: members with extensions %s are not read", where, sorted(ignored))
    if not samples:
        raise ShardError(f"{where} holds no sample; expected KEY.json and KEY.jpg|jpeg|png|webp")
    for key, members in samples.items():
        if "record" not in members:
            raise ShardError(
                f"{where}: sample `{key}` has a picture and no `{key}.json`; add the record"
            )
    return _to_columns(samples, tar_size, head_crc)


def _walk(file: BinaryIO, where: Path) -> Iterator[tuple[str, _Member]]:
    """Yield key and member in order, checking what tarfile lets pass at the end."""
    damaged = "restore it or build it again"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                match = _MEMBER.fullmatch(info.name)
                if not info.isfile() or match is None:
                    raise ShardError(
                        f"{where}: member `{info.name}` is not a file called KEY.EXTENSION"
                    )
                key, extension = match.group(1), match.group(2).lower()
                file.seek(info.offset_data)
                data = file.read(info.size)
                if len(data) != info.size:
                    raise ShardError(f"{where} is truncated within `{info.name}`; {damaged}")
                yield key, _read_member(data, info.offset_data, extension, key, where)
            end = tar.offset  # tarfile takes a broken header after the first one for the end
    except tarfile.TarError as error:
        raise ShardError(f"{where} is not a whole tar ({error}); {damaged}") from error
    file.seek(end)
    tail = file.read(_BLOCK)
    if len(tail) != _BLOCK or any(tail):
        what = "is truncated" if len(tail) < _BLOCK else "has a broken header"
        raise ShardError(f"{where} {what} at byte {end}; {damaged}")


def _read_member(data: bytes, offset: int, extension: str, key: str, where: Path) -> _Member:
    crc = zlib.crc32(data)
    if extension == "json":
        try:
            record: Any = json.loads(data)
        except ValueError as error:
            raise ShardError(f"{where}: {key}.json is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ShardError(
                f"{where}: {key}.json holds {type(record).__name__}; a record is a JSON object. "
                "Correct the record and build the shard again"
            )
    width = height = 0
    if extension in IMAGE_EXTENSIONS:
        try:
            width, height = image_size(data, key=key)
        except RecordError as error:  # an index describes what is there; reading it complains
            log.warning("%s: %s", where, error)
    return _Member(extension, offset, len(data), crc, width, height)


def _to_columns(samples: dict[str, dict[str, _Member]], tar_size: int, head_crc: int) -> ShardIndex:
    keys = [key.encode() for key in samples]
    records = [members["record"] for members in samples.values()]
    none = _Member("", _NO_IMAGE, 0, 0)
    images = [members.get("image", none) for members in samples.values()]
    extensions = [IMAGE_EXTENSIONS.index(m.extension) if m.extension else -1 for m in images]
    columns: dict[str, Any] = {
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys]),
        "record_offset": [m.offset for m in records],
        "record_size": [m.size for m in records],
        "record_crc": [m.crc for m in records],
        "image_offset": [m.offset for m in images],
        "image_size": [m.size for m in images],
        "image_crc": [m.crc for m in images],
        "image_extension": extensions,
        "picture_size": [(m.width, m.height) for m in images],
    }
    arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in _COLUMNS.items()}
    return ShardIndex(tar_size, head_crc, **arrays)


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index so that it appears under its name only when it is whole."""
    meta = {
        "format": "vipllava-shard-index",
        "version": INDEX_VERSION,
        "tar_size": index.tar_size,
        "head_crc": index.head_crc,
    }
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _COLUMNS}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_index(path: Path, tar: Path) -> ShardIndex:
    """Read an index and check that it belongs to ``tar``.

    Raises:
        ShardError: the index is damaged, of another version, or made from another tar.
    """
    remake = f"delete {path} to have it made anew"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            meta = cast("dict[str, Any]", json.loads(str(stored["meta"])))
            if meta.get("version") != INDEX_VERSION:
                raise ShardError(
                    f"{path} has version {meta.get('version')}, this release reads "
                    f"{INDEX_VERSION}; {remake}"
                )
            arrays = {name: stored[name] for name in _COLUMNS}
            index = ShardIndex(int(meta["tar_size"]), int(meta["head_crc"]), **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ShardError(f"{path} is not a shard index ({error}); {remake}") from error
    try:
        size = tar.stat().st_size
        with tar.open("rb") as file:
            head_crc = zlib.crc32(file.read(_HEAD_BYTES))
    except OSError as error:
        raise ShardError(f"{tar} cannot be read: {error}") from error
    if size != index.tar_size or head_crc != index.head_crc:
        raise ShardError(
            f"{path} is the index of another tar, or {tar.name} was truncated: indexed "
            f"{index.tar_size} bytes, found {size}. Restore the tar, or {remake}"
        )
    return index
