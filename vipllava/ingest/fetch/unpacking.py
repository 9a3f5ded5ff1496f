"""Archives into image roots: each file checked and only then under its final name.

A run that was broken off is simply done again: files that are there with the right size are kept.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, NamedTuple, cast

from vipllava.files.atomic import new_file
from vipllava.files.download import disk_error
from vipllava.shards.sources import is_inside
from vipllava.types import VipLlavaError

_CHUNK: Final = 1 << 20
_LITTER: Final = ("__MACOSX", ".DS_Store", "Thumbs.db")
_BROKEN: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression this Python lacks
    RuntimeError,  # a password is needed
)


class UnpackError(VipLlavaError):
    """An archive is unsafe, or not the one that was meant."""


class DamagedArchiveError(UnpackError):
    """An archive is broken, truncated or none at all."""


class _Member(NamedTuple):
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    into: Path,
    *,
    folder: str = ".",
    overwrite: bool = False,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> int:
    """Unpack a folder of a zip or tar archive.

    Args:
        archive: zip, tar, or compressed tar.
        into: folder that gets the content of ``folder``; made if missing.
        folder: folder within the archive; ``.`` is the whole archive.
        overwrite: write files anew that are there with the right size.
        on_progress: told the number of files so far and in all, the latter None for tars.

    Returns:
        The number of files that belong there.

    Raises:
        DamagedArchiveError: a broken, truncated or encrypted archive, or none.
        UnpackError: one without that folder, or with a member that would land elsewhere.
        DiskError: the disk is full or cannot be written. Files unpacked so far stay in every case;
            none is partial.
    """
    parts = PurePosixPath(folder).parts
    count, seen = 0, set[str]()
    try:
        with _open(archive) as (members, total):
            for member in members:
                path = PurePosixPath(member.name).parts
                seen.update(path[:1])
                litter = any(part in _LITTER or part.startswith("._") for part in path)
                if path[: len(parts)] != parts or path == parts or litter:
                    continue
                target = into.joinpath(*path[len(parts) :])
                whole = target.is_file() and target.stat().st_size == member.size
                if overwrite or not whole:
                    _write(member, target)
                count += 1
                if on_progress is not None:
                    on_progress(count, total)
    except _BROKEN as error:
        raise DamagedArchiveError(
            f"{archive} is damaged or cannot be read ({error}); delete it and get it again"
        ) from error
    except OSError as error:
        raise disk_error(error, f"unpacking {archive}", into) from error
    if not count:
        raise UnpackError(
            f"{archive} has no files below `{folder}`; it has {', '.join(sorted(seen)) or 'none'}. "
            "It is another archive, or `unpack` in the source is wrong"
        )
    return count


def _write(member: _Member, target: Path) -> None:
    with new_file(target) as unfinished:
        with member.open() as source, unfinished.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)  # zipfile compares the CRC at the end
        if unfinished.stat().st_size != member.size:
            raise EOFError(f"`{member.name}` is truncated")


@contextmanager
def _open(archive: Path) -> Generator[tuple[Iterator[_Member], int | None]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _zip_members(file, archive), sum(not i.is_dir() for i in file.infolist())
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive, "r:*") as file:
            yield _tar_members(file, archive), None
    else:
        with archive.open("rb") as file:
            start = file.read(8)
        raise DamagedArchiveError(
            f"{archive} is neither a zip nor a tar (it starts with {start!r}; perhaps a page or a "
            "part of a download); delete it and get it again"
        )


def _zip_members(file: zipfile.ZipFile, archive: Path) -> Iterator[_Member]:
    for info in file.infolist():
        _check_place(info.filename, archive)
        if not info.is_dir():
            yield _Member(info.filename, info.file_size, partial(file.open, info))


def _tar_members(file: tarfile.TarFile, archive: Path) -> Iterator[_Member]:
    headers = _LastRead(cast("IO[bytes]", file.fileobj))
    file.fileobj = cast("Any", headers)
    while (info := file.next()) is not None:
        _check_place(info.name, archive)
        if info.isfile():
            # Regular files have a stream.
            yield _Member(info.name, info.size, cast("Any", partial(file.extractfile, info)))
        elif not info.isdir():
            raise UnpackError(
                f"{archive}: `{info.name}` is a link or a device; an archive of images holds "
                "files only. Unpack it by hand if you trust it"
            )
    # tarfile takes a missing or broken header for the end; the true end is a block of zeros.
    if headers.last != bytes(tarfile.BLOCKSIZE):
        raise EOFError(f"its end is missing after {file.offset} bytes")


class _LastRead:
    """A stream that remembers what was read last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""
        self.seek, self.tell, self.close = stream.seek, stream.tell, stream.close

    def read(self, size: int = -1) -> bytes:
        self.last = self._stream.read(size)
        return self.last


def _check_place(name: str, archive: Path) -> None:
    if "\\" in name or not is_inside(name):
        raise UnpackError(
            f"{archive}: `{name}` would land outside its folder; the archive is not to be trusted"
        )
