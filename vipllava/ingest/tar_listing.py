"""What lies in one tar, as far as it can be read.

Training takes a tar whole or not at all. Lint and verify read on: what is whole in a broken tar, or
in one without an index, is looked at like everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from vipllava.shards.tar_index import (
    IMAGE_EXTENSIONS,
    ShardError,
    index_path,
    load_index,
    parse_object,
)
from vipllava.shards.tar_members import BrokenTarError, iter_members
from vipllava.shards.tars import Entry, ShardSet
from vipllava.types import RecordError

Fault = tuple[str, str, str]
"""Code, key (may be empty) and message."""


@dataclass(slots=True)
class _Row:
    """Where the members of one sample lie: offset and bytes."""

    key: str
    record: tuple[int, int] | None = None
    image: tuple[int, int] | None = None
    extension: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The samples of one tar.

    Attributes:
        path: the tar.
        name: its path for messages, relative to the data root.
        keys: of the samples, in the tar's order.
        faults: of the tar as a whole.
        rows: the tar by its index, or the rows of a tar that has none of its own.
    """

    path: Path
    name: str
    keys: tuple[str, ...]
    faults: tuple[Fault, ...]
    rows: ShardSet | tuple[_Row, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.keys)

    def read(self, file: BinaryIO, row: int) -> Entry:
        """Read one sample from the opened tar.

        Raises:
            ShardError: the bytes are not the indexed ones.
            RecordError: the record is no JSON object.
        """
        shard = Path(self.name)
        if isinstance(self.rows, ShardSet):
            return replace(self.rows.read(row), shard=shard)
        found = self.rows[row]
        assert found.record is not None
        image = None if found.image is None else _bytes(file, *found.image)
        try:
            record = parse_object(_bytes(file, *found.record), f"{found.key}.json")
        except ShardError as error:
            raise RecordError(str(error)) from error
        return Entry(found.key, record, image, found.extension, shard)


def list_tar(path: Path, name: str) -> Listing:
    """List a tar by its index, or by itself where it has none that fits.

    Args:
        path: the tar.
        name: its path for messages.
    """
    fault: tuple[Fault, ...]
    if (sidecar := index_path(path)).is_file():
        try:
            shards = ShardSet(name, [path], [load_index(sidecar, path)])
            return Listing(path, name, tuple(shards.keys()), (), shards)
        except ShardError as error:
            fault = (("shard-broken", "", str(error)),)
    else:
        message = f"no index {sidecar.name}; the next job reads the whole tar to make it"
        fault = (("index-missing", "", message),)
    rows, faults = _walk(path)
    # What is wrong with the tar explains a bad index, and keeps a missing one from being made.
    if not any(code == "shard-broken" for code, _, _ in faults):
        faults = [*fault, *faults]
    return Listing(path, name, tuple(row.key for row in rows), tuple(faults), tuple(rows))


def _walk(path: Path) -> tuple[list[_Row], list[Fault]]:
    """Return the whole samples of a tar, from its headers, and what is wrong with it."""
    rows: list[_Row] = []
    faults: list[Fault] = []
    by_key: dict[str, _Row] = {}
    last: _Row | None = None
    try:
        with path.open("rb") as file:
            for key, extension, place in _members(file, faults):
                kind = "record" if extension == "json" else "image"
                row = last if last is not None and last.key == key else by_key.get(key)
                if row is None or getattr(row, kind) is not None:
                    row = _Row(key)
                    rows.append(row)
                    by_key[key] = row
                elif row is not last:
                    faults.append(
                        (
                            "shard-broken",
                            key,
                            f"the members of `{key}` are not side by side; build the shard again",
                        )
                    )
                setattr(row, kind, place)
                if kind == "image":
                    row.extension = extension
                last = row
    except OSError as error:
        faults.append(("shard-broken", "", f"cannot be read: {error}"))
    except BrokenTarError as error:
        faults.append(("shard-broken", "", f"{error}; restore it or build it again"))
        del rows[-1:]  # its picture may have been behind the break
    return list(_whole(rows, faults)), faults


def _whole(rows: list[_Row], faults: list[Fault]) -> Iterator[_Row]:
    """Yield the rows with a record; a picture alone is a fault."""
    recorded = {row.key for row in rows if row.record is not None}
    for row in rows:
        if row.record is not None:
            yield row
            continue
        what = "a second picture" if row.key in recorded else f"a picture and no `{row.key}.json`"
        message = f"sample `{row.key}` has {what}; build the shard again"
        faults.append(("shard-broken", row.key, message))
    if not recorded and not faults:
        expected = f"KEY.json and KEY.{'|'.join(IMAGE_EXTENSIONS)}"
        faults.append(("shard-broken", "", f"holds no sample; expected {expected}"))


def _members(file: BinaryIO, faults: list[Fault]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield key, extension and place of the members that are read."""
    for member in iter_members(file):
        if member.key is None or member.extension is None:
            message = f"member `{member.name}` is not a file called KEY.EXTENSION; remove it"
            faults.append(("shard-broken", "", message))
        elif member.extension in ("json", *IMAGE_EXTENSIONS):
            yield member.key, member.extension, (member.offset, member.size)


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
