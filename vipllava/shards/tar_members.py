"""The members of a tar as a WebDataset reader sees them, and where the tar breaks."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

BLOCK: Final = 512
"""Members of a tar start at multiples of this, bytes."""

_NAME: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: cut at the first dot


class BrokenTarError(Exception):
    """A tar cannot be read beyond this place; the message says of it what ``is`` wrong."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member: its name as stored, and where its content lies, bytes.

    ``key`` and ``extension`` (in small letters) are None if it is no file ``KEY.EXTENSION``.
    """

    name: str
    key: str | None
    extension: str | None
    offset: int
    size: int


def iter_members(file: BinaryIO) -> Iterator[TarMember]:
    """Yield the members of a tar, folders apart; between two of them it may be read elsewhere.

    Raises:
        BrokenTarError: it is truncated or no tar; tarfile takes some of that for the end.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                if info.isfile() and info.offset_data + info.size > size:
                    raise BrokenTarError(f"is truncated within `{info.name}`")
                match = _NAME.fullmatch(info.name) if info.isfile() else None
                key, extension = (match[1], match[2].lower()) if match else (None, None)
                yield TarMember(info.name, key, extension, info.offset_data, info.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise BrokenTarError(f"is not a whole tar ({error})") from error
    file.seek(end)
    tail = file.read(BLOCK)
    if len(tail) != BLOCK or any(tail):
        what = "is truncated" if len(tail) < BLOCK else "has a broken header"
        raise BrokenTarError(f"{what} at byte {end}")
