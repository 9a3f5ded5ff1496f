"""The sidecar index of a tar: where each member lies, and how to notice that it changed.

``NAME.index.npz`` holds ``samples`` (one row per sample, see ``SAMPLE``), ``keys`` (all keys, one
after the other) and ``meta``, a JSON text with the format version and what identifies the tar.
35 bytes a sample and the key.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from vipllava.files.atomic import new_file
from vipllava.records import record_texts
from vipllava.records.fields import IMAGE_PLACEHOLDER
from vipllava.records.image_decode import image_size
from vipllava.shards.tar_members import BLOCK, BrokenTarError, iter_members
from vipllava.types import RecordError, VipLlavaError

log = logging.getLogger(__name__)

INDEX_VERSION: Final = 2
IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
BYTES_PER_TOKEN: Final = 3.6
"""UTF-8 bytes of English text per token of a Llama tokenizer, about."""

MOST: Final = 65535
"""Largest stored side of a picture and length of a text; it stands for all above, too."""

SAMPLE: Final = np.dtype(
    [
        ("key_end", "<u4"),
        ("record_block", "<u4"),
        ("record_size", "<u4"),
        ("record_crc", "<u4"),
        ("image_block", "<u4"),
        ("image_size", "<u4"),
        ("image_crc", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("text_tokens", "<u2"),
        ("extension", "u1"),
    ]
)
"""A sample in an index: the fields of :class:`SampleRow`."""

_HEAD_BYTES: Final = 4096
_LARGEST: Final = (1 << 32) - 1


class ShardError(VipLlavaError):
    """A shard or its index is missing, damaged, or not what the manifest says."""


class SampleRow(NamedTuple):
    """Where one sample lies.

    Attributes:
        key_end: where its key ends among the keys of its tar.
        record_block, record_size, record_crc: first block, bytes and CRC-32 of the JSON member.
        image_block, image_size, image_crc: the same of the picture; block 0 without one.
        width, height: of the upright picture, pixels, at most ``MOST``; 0 if unreadable or none.
        text_tokens: see :func:`estimate_tokens`.
        extension: index into ``IMAGE_EXTENSIONS``; 0 without a picture.
    """

    key_end: int
    record_block: int
    record_size: int
    record_crc: int
    image_block: int = 0
    image_size: int = 0
    image_crc: int = 0
    width: int = 0
    height: int = 0
    text_tokens: int = 0
    extension: int = 0


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One tar's samples.

    Attributes:
        tar_size: bytes of the whole tar.
        head_crc: CRC-32 of the tar's first 4096 bytes.
        keys: uint8, all keys one after the other.
        samples: ``SAMPLE`` [samples].
    """

    tar_size: int
    head_crc: int
    keys: npt.NDArray[np.uint8]
    samples: npt.NDArray[np.void]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    @property
    def content_crc(self) -> int:
        """CRC-32 over keys and members' checksums: the same for the same content."""
        crc = zlib.crc32(self.keys.tobytes())
        for name in ("record_crc", "image_crc"):
            crc = zlib.crc32(self.samples[name].tobytes(), crc)
        return crc


def split_keys(keys: bytes, ends: npt.NDArray[Any]) -> Iterator[bytes]:
    """Cut keys that lie one after the other."""
    start = 0
    for end in ends.tolist():
        yield keys[start:end]
        start = end


def index_name(tar_name: str) -> str:
    """Return the name of a tar's index."""
    return f"{tar_name.removesuffix('.tar')}.index.npz"


def index_path(tar: Path) -> Path:
    """Return where the index of ``tar`` lies."""
    return tar.with_name(index_name(tar.name))


def estimate_tokens(record: Mapping[str, Any]) -> int:
    """Estimate how many tokens the texts of a record make.

    The UTF-8 bytes of its texts (see :func:`vipllava.records.record_texts`) divided by
    ``BYTES_PER_TOKEN``, rounded up, at most ``MOST``. Not counted are the image, the system prompt
    and the wording of instructions. The record need not be valid.
    """
    num_bytes = sum(map(_text_bytes, record_texts(record)))
    return min(MOST, math.ceil(num_bytes / BYTES_PER_TOKEN))


def _text_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value.replace(IMAGE_PLACEHOLDER, "").encode(errors="replace"))
    if isinstance(value, list):  # VCR: words and lists of object numbers, read with spaces
        return sum(1 + _text_bytes(item) for item in cast("list[Any]", value))
    return 0


@dataclass(frozen=True, slots=True)
class _Member:
    extension: str
    offset: int
    size: int
    crc: int
    width: int = 0
    height: int = 0
    text_tokens: int = 0


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
    try:
        with path.open("rb") as file:
            return index_tar(file, str(where))
    except OSError as error:
        raise ShardError(f"{where} cannot be read: {error}") from error


def index_tar(file: BinaryIO, where: str) -> ShardIndex:
    """Index a tar that is open for reading; see :func:`build_index`.

    Args:
        file: the tar.
        where: its path or address, for messages.
    """
    samples: dict[str, dict[str, _Member]] = {}
    ignored: set[str] = set()
    last = None
    for key, member in _walk(file, where):
        if member.extension not in ("json", *IMAGE_EXTENSIONS):
            ignored.add(member.extension)
            continue
        if key != last and key in samples:
            raise ShardError(
                f"{where}: key `{key}` occurs twice, or its members are not side by side; build "
                "the shard again with unique keys"
            )
        last = key
        members = samples.setdefault(key, {})
        kind = "record" if member.extension == "json" else "image"
        if kind in members:
            raise ShardError(
                f"{where}: sample `{key}` has two members of kind {kind}; keep one of them and "
                "build the shard again"
            )
        members[kind] = member
    if ignored:
        log.warning("%s: members with extensions %s are not read", where, sorted(ignored))
    if not samples:
        raise ShardError(
            f"{where} holds no sample; expected KEY.json and KEY.jpg|jpeg|png|webp. Build it "
            "again, or remove it"
        )
    for key, members in samples.items():
        if "record" not in members:
            raise ShardError(
                f"{where}: sample `{key}` has a picture and no `{key}.json`; add the record"
            )
    index = _to_index(samples, *_identify(file), where)
    if num_blank := int((index.samples["text_tokens"] == 0).sum()):
        log.warning(
            "%s: %d of %d records have no text in a field that a known record kind reads; their "
            "lengths are estimated as 0. For a kind of your own: name its module as kind_module in "
            "the manifest, delete the index, and open the data set by that manifest",
            where, num_blank, len(index),
        )  # fmt: skip
    return index


def _identify(file: BinaryIO) -> tuple[int, int]:
    """Return size and head CRC of a tar."""
    file.seek(0)
    return os.fstat(file.fileno()).st_size, zlib.crc32(file.read(_HEAD_BYTES))


def _walk(file: BinaryIO, where: str) -> Iterator[tuple[str, _Member]]:
    """Yield key and member in order; the first fault ends it."""
    try:
        for member in iter_members(file):
            if member.key is None or member.extension is None:
                raise ShardError(
                    f"{where}: member `{member.name}` is not a file called KEY.EXTENSION; "
                    "build the shard again without it"
                )
            file.seek(member.offset)
            data = file.read(member.size)
            yield member.key, _read_member(data, member.offset, member.extension, member.key, where)
    except BrokenTarError as error:
        raise ShardError(f"{where} {error}; restore it or build it again") from error


def _read_member(data: bytes, offset: int, extension: str, key: str, where: str) -> _Member:
    crc = zlib.crc32(data)
    width = height = tokens = 0
    if extension == "json":
        tokens = estimate_tokens(parse_object(data, f"{where}: {key}.json"))
    elif extension in IMAGE_EXTENSIONS:
        try:
            width, height = image_size(data, key=key)
        except RecordError as error:  # an index describes what is there; reading it complains
            log.warning("%s: %s", where, error)
    return _Member(extension, offset, len(data), crc, width, height, tokens)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Read a stored record.

    Raises:
        ShardError: it is no JSON object.
    """
    try:
        record: Any = json.loads(data)
    except ValueError as error:
        raise ShardError(
            f"{where} is not JSON ({error}). Correct the record and build the shard again"
        ) from error
    if not isinstance(record, dict):
        raise ShardError(
            f"{where} holds {type(record).__name__}; a record is a JSON object. Correct the record "
            "and build the shard again"
        )
    return cast("dict[str, Any]", record)


def _to_index(
    samples: Mapping[str, Mapping[str, _Member]], tar_size: int, head_crc: int, where: str
) -> ShardIndex:
    keys = [key.encode() for key in samples]
    rows: list[SampleRow] = []
    key_end = 0
    for key, members in zip(keys, samples.values(), strict=True):
        key_end += len(key)
        record = members["record"]
        row = SampleRow(key_end, record.offset // BLOCK, record.size, record.crc)
        row = row._replace(text_tokens=record.text_tokens)
        if (image := members.get("image")) is not None:
            row = row._replace(
                image_block=image.offset // BLOCK,
                image_size=image.size,
                image_crc=image.crc,
                width=min(MOST, image.width),
                height=min(MOST, image.height),
                extension=IMAGE_EXTENSIONS.index(image.extension),
            )
        if max(row) > _LARGEST:
            raise ShardError(f"{where}: sample `{key.decode()}` is too large; make smaller tars")
        rows.append(row)
    joined = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return ShardIndex(tar_size, head_crc, joined, np.array(rows, dtype=SAMPLE))


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index so that it appears under its name only when it is whole."""
    meta = {
        "format": "vipllava-shard-index",
        "version": INDEX_VERSION,
        "tar_size": index.tar_size,
        "head_crc": index.head_crc,
        "content_crc": index.content_crc,
    }
    with new_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), keys=index.keys, samples=index.samples)


def read_index(file: BinaryIO, where: str, remake: str) -> ShardIndex:
    """Read an index without its tar.

    Args:
        file: the index.
        where: its path or address, for messages.
        remake: how it is made again, for messages.

    Raises:
        ShardError: it is damaged, or of another version than this release writes.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            meta = cast("dict[str, Any]", json.loads(str(stored["meta"])))
            if meta["version"] != INDEX_VERSION:
                raise ShardError(
                    f"{where} has version {meta['version']!r}, this release reads {INDEX_VERSION}; "
                    f"update the package, or {remake}"
                )
            index = ShardIndex(
                int(meta["tar_size"]), int(meta["head_crc"]), stored["keys"], stored["samples"]
            )
        _check(index, int(meta["content_crc"]))
    except (
        OSError, ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError,
        AttributeError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ShardError(f"{where} is not a shard index ({error}); {remake}") from error
    return index


def load_index(path: Path, tar: Path) -> ShardIndex:
    """Read an index and check that it belongs to ``tar``.

    Raises:
        ShardError: it is damaged, of another version, or made from another tar.
    """
    remake = f"delete {path} to have it made again"
    try:
        with path.open("rb") as file:
            index = read_index(file, str(path), remake)
    except OSError as error:
        raise ShardError(f"{path} is not a shard index ({error}); {remake}") from error
    try:
        with tar.open("rb") as content:
            size, head_crc = _identify(content)
    except OSError as error:
        raise ShardError(f"{tar} cannot be read: {error}") from error
    if (size, head_crc) != (index.tar_size, index.head_crc):
        raise ShardError(
            f"{path} is the index of another tar, or {tar.name} was truncated: indexed "
            f"{index.tar_size} bytes, found {size}. Restore the tar, or {remake}"
        )
    return index


def ensure_index(tar: Path) -> ShardIndex:
    """Read the index of a tar; make it where there is none.

    Raises:
        ShardError: tar or index cannot be used.
    """
    path = index_path(tar)
    if path.is_file():
        return load_index(path, tar)
    log.info("%s has no index; reading it once to make one", tar)
    index = build_index(tar)
    try:
        save_index(index, path)
    except OSError as error:  # a read-only data folder still works, only slower next time
        log.warning("%s could not be written (%s); the index is kept in memory", path, error)
    return index


def _check(index: ShardIndex, content_crc: int) -> None:
    if index.samples.dtype != SAMPLE or index.keys.dtype != np.uint8 or not len(index):
        raise ValueError("its columns are of other types, or it is empty")
    ends = index.samples["key_end"].astype(np.int64)
    if ends[-1] != len(index.keys) or (np.diff(ends, prepend=0) <= 0).any():
        raise ValueError("its keys are cut off")
    if content_crc != index.content_crc:
        raise ValueError("its rows do not match its checksum")


def tar_name(tar: Path | str) -> str:
    """Return a tar's file name, be it a path, an address or a command."""
    text = str(tar)
    if "://" in text and not text.startswith("pipe:"):
        text = text.partition("?")[0]
    names = re.findall(r"[^/\s?=&'\"]+\.tar\b", text)
    return names[-1] if names else text.rpartition("/")[2]
