"""What the tar of a shard holds, member by member: keys, records and pictures."""

from __future__ import annotations

import json
import logging
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from vipllava.data.image_decode import image_size
from vipllava.data.schemas.fields import IMAGE_PLACEHOLDER
from vipllava.types import RecordError, VipLlavaError

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
BLOCK: Final = 512
"""Members of a tar start at multiples of this, bytes."""

BYTES_PER_TOKEN: Final = 3.6
"""UTF-8 bytes of English text per token of a Llama tokenizer, about."""

MOST: Final = 65535
"""Largest stored side of a picture and length of a text; it stands for all above, too."""

_MEMBER: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: cut at the first dot
_TEXT_FIELDS: Final = (
    "question", "general_question", "answer", "grounding", "answer_choices", "rationale_choices",
)  # fmt: skip


class ShardError(VipLlavaError):
    """A shard or its index is missing, damaged, or not what the manifest says."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar: bytes from the tar's start, and what an index says of it."""

    extension: str
    offset: int
    size: int
    crc: int
    width: int = 0
    height: int = 0
    text_tokens: int = 0


def walk_tar(file: BinaryIO, where: str) -> Iterator[tuple[str, Member]]:
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
                        f"{where}: member `{info.name}` is not a file called KEY.EXTENSION; "
                        "build the shard again without it"
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
    tail = file.read(BLOCK)
    if len(tail) != BLOCK or any(tail):
        what = "is truncated" if len(tail) < BLOCK else "has a broken header"
        raise ShardError(f"{where} {what} at byte {end}; {damaged}")


def _read_member(data: bytes, offset: int, extension: str, key: str, where: str) -> Member:
    crc = zlib.crc32(data)
    width = height = tokens = 0
    if extension == "json":
        tokens = estimate_tokens(parse_object(data, f"{where}: {key}.json"))
    elif extension in IMAGE_EXTENSIONS:
        try:
            width, height = image_size(data, key=key)
        except RecordError as error:  # an index describes what is there; reading it complains
            log.warning("%s: %s", where, error)
    return Member(extension, offset, len(data), crc, width, height, tokens)


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


def estimate_tokens(record: Mapping[str, Any]) -> int:
    """Estimate how many tokens the texts of a record make.

    The UTF-8 bytes of the conversation, or for records without one of question, answer, caption
    and choices, divided by ``BYTES_PER_TOKEN``, rounded up, at most ``MOST``. Not counted are the
    picture, the system prompt and the wording of instructions. The record need not be valid.
    """
    if isinstance(record.get("conversations"), list):
        fields: Iterable[Any] = [
            cast("dict[Any, Any]", turn).get("value")
            for turn in cast("list[Any]", record["conversations"])
            if isinstance(turn, dict)
        ]
    else:
        fields = [record.get(name) for name in _TEXT_FIELDS]
    return min(MOST, math.ceil(sum(map(_text_bytes, fields)) / BYTES_PER_TOKEN))


def _text_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value.replace(IMAGE_PLACEHOLDER, "").encode(errors="replace"))
    if isinstance(value, list):  # VCR: words and lists of object numbers, read with spaces
        return sum(1 + _text_bytes(item) for item in cast("list[Any]", value))
    return 0


def tar_name(tar: Path | str) -> str:
    """Return a tar's file name, be it a path, an address or a command."""
    text = str(tar)
    if "://" in text and not text.startswith("pipe:"):
        text = text.partition("?")[0]
    names = re.findall(r"[^/\s?=&'\"]+\.tar\b", text)
    return names[-1] if names else text.rpartition("/")[2]
