"""The samples of a tar as a WebDataset reader sees them, and what is wrong with it."""

from __future__ import annotations

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
BLOCK: Final = 512
"""Members of a tar start at multiples of this, bytes."""

_NAME: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: cut at the first dot
_OTHER_IMAGES: Final = ("avif", "bmp", "gif", "heic", "heif", "tif", "tiff")
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}  # fmt: skip


# The library's own, and what it meets on its way through a header that holds anything.
_BROKEN: Final = (
    tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


class BrokenTarError(Exception):
    """A tar cannot be read beyond this place; the message says of it what ``is`` wrong."""

    remedy = "restore it or build it again"


class CompressedTarError(BrokenTarError):
    """A tar is compressed, so that nothing in it can be found by its place."""

    remedy = "decompress it: samples are read by their places in a plain tar"


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member: its name (what is no UTF-8 as escapes), and where its content lies, bytes.

    ``key`` and ``extension`` (in small letters) are None if it is no file ``KEY.EXTENSION`` with a
    name in UTF-8.
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


class Contents(NamedTuple):
    """What a tar holds."""

    samples: list[tuple[str, Members]]  # keys and members of the whole samples
    problems: list[TarProblem]  # what is wrong with it
    ignored: Counter[str]  # how many members with which other extension are not read


def list_samples(file: BinaryIO, where: str) -> Contents:
    """Read the members of a tar; ``where`` is its path or address, for the log."""
    samples: list[tuple[str, Members]] = []
    problems: list[TarProblem] = []
    by_key: dict[str, Members] = {}
    last: Members | None = None
    ignored: Counter[str] = Counter()
    lost: list[str] = []
    try:
        for member in iter_members(file):
            key, extension = member.key, member.extension
            if key is None or extension is None:
                what = f"`{member.name}` that is not a file called KEY.EXTENSION, in UTF-8"
                problems.append(TarProblem(f"has a member {what}; build it again without that"))
                continue
            if extension not in ("json", *IMAGE_EXTENSIONS):
                ignored[extension] += 1
                if extension.rpartition(".")[2] in ("json", *IMAGE_EXTENSIONS, *_OTHER_IMAGES):
                    lost.append(member.name)
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
        problems.append(TarProblem(f"{error}; {error.remedy}"))
        del samples[-1:]  # its image may have been behind the break
    if lost:
        problems.append(TarProblem(_lost_text(lost)))
    elif ignored:
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
    return Contents(whole, problems, ignored)


def _lost_text(names: list[str]) -> str:
    """Say of members that look like samples and are not read why that is so."""
    match = _NAME.fullmatch(names[0])
    assert match is not None
    key, extension = match.groups()
    if "." in extension:
        stem, _, suffix = extension.rpartition(".")
        why = f"a name is cut at its first dot, so that this is `.{extension}` of a sample `{key}`"
        remedy = f"call it `{key}_{stem.replace('.', '_')}.{suffix}`"
    else:
        why = f"images are {', '.join(IMAGE_EXTENSIONS)}"
        remedy = "convert it"
    return (
        f"has {len(names)} members such as `{names[0]}` that would not be read ({why}); {remedy}, "
        "or leave such members out"
    )


def _shown(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


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
                end = info.offset_data + info.size
                # A negative size would lead backwards, and round and round.
                if info.size < 0 or (info.isfile() and end > size):
                    raise BrokenTarError(f"is truncated within `{_shown(info.name)}`")
                if info.isdir():
                    continue
                plain = info.isfile() and not info.issparse() and _shown(info.name) == info.name
                match = _NAME.fullmatch(info.name) if plain else None
                key, extension = (match[1], match[2].lower()) if match else (None, None)
                yield TarMember(_shown(info.name), key, extension, info.offset_data, info.size)
            end = tar.offset
    except _BROKEN as error:
        file.seek(0)
        start = file.read(BLOCK)
        for magic, method in _COMPRESSED.items():
            if start.startswith(magic):
                raise CompressedTarError(f"is compressed ({method})") from error
        raise BrokenTarError(f"is not a whole tar ({error})") from error
    file.seek(end)
    tail = file.read(BLOCK)
    if len(tail) != BLOCK or any(tail):
        what = "is truncated" if len(tail) < BLOCK else "has a broken header"
        raise BrokenTarError(f"{what} at byte {end}")
