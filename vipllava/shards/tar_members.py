"""The samples of a tar as a WebDataset reader sees them, and what is wrong with it."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
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


class TarProblem(NamedTuple):
    """What is wrong with the sample ``key``, or, if that is empty, with the tar as a whole."""

    message: str  # a sentence about the sample; of the tar what follows its name
    key: str = ""
    code: str = "shard-broken"


Members = dict[str, TarMember]
"""The ``record`` of a sample and, unless it is text only, its ``image``."""


def list_samples(file: BinaryIO, where: str) -> tuple[list[tuple[str, Members]], list[TarProblem]]:
    """Return keys and members of the whole samples of a tar, and what is wrong with it.

    ``where`` is its path or address, for the log.
    """
    samples: list[tuple[str, Members]] = []
    problems: list[TarProblem] = []
    by_key: dict[str, Members] = {}
    last: Members | None = None
    ignored: set[str] = set()
    try:
        for member in iter_members(file):
            key, extension = member.key, member.extension
            if key is None or extension is None:
                message = f"has a member `{member.name}` that is not a file called KEY.EXTENSION"
                problems.append(TarProblem(f"{message}; build it again without that"))
                continue
            if extension not in ("json", *IMAGE_EXTENSIONS):
                ignored.add(extension)
                continue
            kind = "record" if extension == "json" else "image"
            members = by_key.get(key)
            if members is None or kind in members:
                members = by_key[key] = {}
                samples.append((key, members))
            elif members is not last:
                message = f"the members of `{key}` are not side by side, or the key occurs twice"
                problems.append(TarProblem(f"{message}; build the shard again", key))
            members[kind] = member
            last = members
    except BrokenTarError as error:
        problems.append(TarProblem(f"{error}; restore it or build it again"))
        del samples[-1:]  # its image may have been behind the break
    if ignored:
        log.warning("%s: members with extensions %s are not read", where, sorted(ignored))
    whole = [sample for sample in samples if "record" in sample[1]]
    recorded = {key for key, _ in whole}
    for key, members in samples:
        if "record" not in members:
            what = "a second image" if key in recorded else f"an image and no `{key}.json`"
            problems.append(TarProblem(f"sample `{key}` has {what}; build the shard again", key))
    if not whole and not problems:
        expected = f"KEY.json and KEY.{'|'.join(IMAGE_EXTENSIONS)}"
        problems.append(TarProblem(f"holds no sample; expected {expected}. Build it again"))
    return whole, problems


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """Return the content of a member."""
    file.seek(member.offset)
    return file.read(member.size)


def iter_members(file: BinaryIO) -> Iterator[TarMember]:
    """Yield the members of a tar, folders apart.

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
