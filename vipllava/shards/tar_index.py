"""The sidecar index of a tar: where each member lies, and how to notice that it changed.

``NAME.index.npz`` holds ``samples`` (one row per sample, see ``SAMPLE``), ``keys`` (all keys, one
after the other) and ``meta``, a JSON text with the format version and what identifies the tar.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from vipllava.files.atomic import new_file
from vipllava.records import record_texts
from vipllava.records.fields import IMAGE_PLACEHOLDER
from vipllava.records.image_decode import image_size
from vipllava.records.json_values import parse_json
from vipllava.shards.tar_members import BLOCK, IMAGE_EXTENSIONS, list_samples, read_member
from vipllava.types import RecordError, VipLlavaError

log = logging.getLogger(__name__)

INDEX_VERSION: Final = 2
BYTES_PER_TOKEN: Final = 3.6
"""UTF-8 bytes of English text per token of a Llama tokenizer, about."""

MOST: Final = 65535
"""Largest stored side of an image and length of a text; it stands for all above, too."""

_HEAD_BYTES: Final = 4096
_LARGEST: Final = (1 << 32) - 1


class ShardError(VipLlavaError):
    """A shard or its index is missing, damaged, or not what the manifest says."""


class SampleRow(NamedTuple):
    """Where one sample lies."""

    key_end: int  # where its key ends among the keys of its tar
    record_block: int  # first block, bytes and CRC-32 of the JSON member
    record_size: int
    record_crc: int
    image_block: int = 0  # the same of the image; block 0 without one
    image_size: int = 0
    image_crc: int = 0
    width: int = 0  # of the upright image, pixels, at most ``MOST``; 0 if unreadable or none
    height: int = 0
    text_tokens: int = 0  # see :func:`estimate_tokens`
    extension: int = 0  # index into ``IMAGE_EXTENSIONS``; 0 without an image


SAMPLE: Final = np.dtype(
    {"names": SampleRow._fields, "formats": [*["<u4"] * 7, *["<u2"] * 3, "u1"]}
)
"""A sample in an index, 35 bytes."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One tar's samples."""

    tar_size: int  # bytes of the whole tar
    head_crc: int  # CRC-32 of the tar's first 4096 bytes
    keys: npt.NDArray[np.uint8]  # uint8, all keys one after the other
    samples: npt.NDArray[np.void]  # ``SAMPLE`` [samples]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def content_crc(self) -> int:
        """CRC-32 over keys and members' checksums: the same for the same content."""
        crc = zlib.crc32(self.keys.tobytes())
        for name in ("record_crc", "image_crc"):
            crc = zlib.crc32(self.samples[name].tobytes(), crc)
        return crc


def index_name(tar_name: str) -> str:
    """Return the name of a tar's index."""
    return f"{tar_name.removesuffix('.tar')}.index.npz"


def index_path(tar: Path) -> Path:
    """Return where the index of ``tar`` lies."""
    return tar.with_name(index_name(tar.name))


def estimate_tokens(record: Mapping[str, Any]) -> int:
    """Estimate how many tokens the texts of a record make, be it valid or not.

    The UTF-8 bytes of :func:`vipllava.records.record_texts` divided by ``BYTES_PER_TOKEN``, rounded
    up, at most ``MOST``; without the image, the system prompt and the wording of instructions.
    """
    num_bytes = sum(map(_text_bytes, record_texts(record)))
    return min(MOST, math.ceil(num_bytes / BYTES_PER_TOKEN))


def _text_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value.replace(IMAGE_PLACEHOLDER, "").encode(errors="replace"))
    if isinstance(value, list):  # VCR: words and lists of object numbers, read with spaces
        return sum(1 + _text_bytes(item) for item in cast("list[Any]", value))
    return 0


def build_index(path: Path, *, name: str | None = None) -> ShardIndex:
    """Read a tar and index it; ``name`` is its final name, where ``path`` is a temporary one.

    Raises:
        ShardError: the tar is missing, truncated, broken or empty, a sample has no record or two
            images, a key occurs twice, or a record is no JSON object.
    """
    where = path.with_name(name) if name else path
    try:
        with path.open("rb") as file:
            return index_tar(file, str(where))
    except OSError as error:
        raise ShardError(f"{where} cannot be read: {error}") from error


def index_tar(file: BinaryIO, where: str) -> ShardIndex:
    """Index an open tar as :func:`build_index`; ``where`` is its path or address, for messages."""
    samples, problems, _ = list_samples(file, where)
    if problems:
        message, key, _ = problems[0]
        raise ShardError(f"{where}{':' if key else ''} {message}")
    keys: list[bytes] = []
    rows: list[SampleRow] = []
    seen: set[str] = set()
    for key, members in samples:
        if key in seen:
            raise ShardError(
                f"{where}: key `{key}` occurs twice; build the shard again with unique keys"
            )
        seen.add(key)
        row = {"key_end": len(key.encode()) + (rows[-1].key_end if rows else 0)}
        for kind, member in members.items():
            data = read_member(file, member)
            row[f"{kind}_block"] = member.offset // BLOCK
            row[f"{kind}_size"] = len(data)
            row[f"{kind}_crc"] = zlib.crc32(data)
            if kind == "record":
                row["text_tokens"] = estimate_tokens(parse_object(data, f"{where}: {key}.json"))
                continue
            row["extension"] = IMAGE_EXTENSIONS.index(member.extension or "")
            try:
                width, height = image_size(data, key=key)
                row |= {"width": min(MOST, width), "height": min(MOST, height)}
            except RecordError as error:  # an index describes what is there; reading it complains
                log.warning("%s: %s", where, error)
        keys.append(key.encode())
        rows.append(SampleRow(**row))
        if max(rows[-1]) > _LARGEST:
            raise ShardError(f"{where}: sample `{key}` is too large; make smaller tars")
    if num_blank := sum(row.text_tokens == 0 for row in rows):
        log.warning(
            "%s: %d of %d records have no text in a field that a known record kind reads; their "
            "lengths are estimated as 0. For a kind of your own: name its module as kind_module in "
            "the manifest, delete the index, and open the data set by that manifest",
            where, num_blank, len(rows),
        )  # fmt: skip
    joined = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return ShardIndex(*_identify(file), joined, np.array(rows, dtype=SAMPLE))


def _identify(file: BinaryIO) -> tuple[int, int]:
    """Return size and head CRC of a tar."""
    file.seek(0)
    return os.fstat(file.fileno()).st_size, zlib.crc32(file.read(_HEAD_BYTES))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Read a stored record; raises ShardError if it is no JSON object."""
    try:
        record: Any = parse_json(data)
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


def read_index(file: BinaryIO | Path, where: str, remake: str) -> ShardIndex:
    """Read an index without its tar; messages say ``where`` it is and how to ``remake`` it.

    Raises:
        ShardError: it is missing, damaged, or of another version than this release writes.
    """
    try:
        # numpy leaves a broken file open that it has opened itself.
        opened = file.open("rb") if isinstance(file, Path) else nullcontext(file)
        with opened as content, np.load(content, allow_pickle=False) as stored:
            meta: dict[str, Any] = json.loads(str(stored["meta"]))
            if meta["version"] != INDEX_VERSION:
                raise ShardError(
                    f"{where} has version {meta['version']!r}, this release reads {INDEX_VERSION}; "
                    f"update the package, or {remake}"
                )
            index = ShardIndex(
                int(meta["tar_size"]), int(meta["head_crc"]), stored["keys"], stored["samples"]
            )
        if index.samples.dtype != SAMPLE or index.keys.dtype != np.uint8 or not len(index):
            raise ValueError("its columns are of other types, or it is empty")
        ends = index.samples["key_end"].astype(np.int64)
        if ends[-1] != len(index.keys) or (np.diff(ends, prepend=0) <= 0).any():
            raise ValueError("its keys are cut off")
        if meta["content_crc"] != index.content_crc:
            raise ValueError("its rows do not match its checksum")
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
    index = read_index(path, str(path), remake)
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
    """Read the index of a tar, or make it; raises ShardError if one of them cannot be used."""
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


def tar_name(tar: Path | str) -> str:
    """Return a tar's file name, be it a path, an address or a command."""
    text = str(tar)
    if "://" in text and not text.startswith("pipe:"):
        text = text.partition("?")[0]
    names = re.findall(r"[^/\s?=&'\"]+\.tar\b", text)
    return names[-1] if names else text.rpartition("/")[2]
