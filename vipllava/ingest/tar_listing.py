"""The tars of a data set that are there, and what lies in one, as far as it can be read.

Training takes a tar whole or not at all. Lint and verify read on: what is whole in a broken tar, or
in one without an index, is looked at like everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.patterns import match_patterns
from vipllava.shards.tar_index import (
    IMAGE_EXTENSIONS,
    ShardError,
    index_path,
    load_index,
    parse_object,
)
from vipllava.shards.tar_members import BrokenTarError, TarMember, iter_members
from vipllava.shards.tars import Entry, ShardSet
from vipllava.types import RecordError

_Members = dict[str, TarMember]
"""The ``record`` of a sample and, unless it is text only, its ``image``."""


class TarProblem(NamedTuple):
    """What is wrong with a tar: ``key`` is that of the sample, empty for the tar as a whole."""

    message: str
    key: str = ""
    code: str = "shard-broken"


def find_tars(manifest: Manifest, data_root: Path) -> tuple[list[str], list[str]]:
    """Return the tars that are there, and the names or patterns of none; without addresses."""
    present: list[str] = []
    absent: list[str] = []
    local = [pattern for pattern in manifest.shards if not is_remote(pattern)]
    for _, name, tars in match_patterns(local, data_root):
        present += [path.relative_to(data_root).as_posix() for path in tars]
        absent += [] if tars else [name]
    return present, absent


@dataclass(frozen=True, slots=True)
class Listing:
    """The samples of one tar."""

    path: Path  # the tar
    name: str  # its path for messages, relative to the data root
    keys: tuple[str, ...]  # of the samples, in the tar's order
    problems: tuple[TarProblem, ...]  # of the tar as a whole
    # the tar by its index, or the members of a tar that has none of its own
    samples: ShardSet | tuple[_Members, ...]

    def read(self, row: int) -> Entry:
        """Read one sample.

        Raises:
            ShardError: the bytes are not the indexed ones.
            RecordError: the record is no JSON object.
        """
        shard = Path(self.name)
        if isinstance(self.samples, ShardSet):
            return replace(self.samples.read(row), shard=shard)
        key, members = self.keys[row], self.samples[row]
        image = members.get("image")
        with self.path.open("rb") as file:
            text = _content(file, members["record"])
            data = None if image is None else _content(file, image)
        try:
            record = parse_object(text, f"{key}.json")
        except ShardError as error:
            raise RecordError(str(error)) from error
        return Entry(key, record, data, image and image.extension, shard)


def _content(file: BinaryIO, member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def list_tar(path: Path, name: str) -> Listing:
    """List a tar by its index, or by itself where it has none that fits.

    Args:
        path: the tar.
        name: its path for messages.
    """
    if (sidecar := index_path(path)).is_file():
        try:
            shards = ShardSet(name, [path], [load_index(sidecar, path)])
            return Listing(path, name, tuple(shards.keys()), (), shards)
        except ShardError as error:
            problem = TarProblem(str(error))
    else:
        message = f"no index {sidecar.name}; the next job reads the whole tar to make it"
        problem = TarProblem(message, code="index-missing")
    keys, samples, problems = _walk(path)
    # What is wrong with the tar explains a bad index, and keeps a missing one from being made.
    return Listing(path, name, keys, tuple(problems or [problem]), samples)


def _walk(path: Path) -> tuple[tuple[str, ...], tuple[_Members, ...], list[TarProblem]]:
    """Return keys and members of the whole samples of a tar, and what is wrong with it."""
    samples: list[tuple[str, _Members]] = []
    problems: list[TarProblem] = []
    by_key: dict[str, _Members] = {}
    last: _Members | None = None
    try:
        with path.open("rb") as file:
            for member in iter_members(file):
                if member.key is None or member.extension is None:
                    message = f"member `{member.name}` is not a file called KEY.EXTENSION"
                    problems.append(TarProblem(f"{message}; remove it"))
                    continue
                if member.extension not in ("json", *IMAGE_EXTENSIONS):
                    continue
                kind = "record" if member.extension == "json" else "image"
                members = by_key.get(member.key)
                if members is None or kind in members:
                    members = by_key[member.key] = {}
                    samples.append((member.key, members))
                elif members is not last:
                    message = f"the members of `{member.key}` are not side by side"
                    problems.append(TarProblem(f"{message}; build the shard again", member.key))
                members[kind] = member
                last = members
    except OSError as error:
        problems.append(TarProblem(f"cannot be read: {error}"))
    except BrokenTarError as error:
        problems.append(TarProblem(f"{error}; restore it or build it again"))
        del samples[-1:]  # its image may have been behind the break
    whole = [sample for sample in samples if "record" in sample[1]]
    recorded = {key for key, _ in whole}
    for key, members in samples:
        if "record" not in members:
            what = "a second image" if key in recorded else f"an image and no `{key}.json`"
            problems.append(TarProblem(f"sample `{key}` has {what}; build the shard again", key))
    if not whole and not problems:
        expected = f"KEY.json and KEY.{'|'.join(IMAGE_EXTENSIONS)}"
        problems.append(TarProblem(f"holds no sample; expected {expected}"))
    return tuple(key for key, _ in whole), tuple(members for _, members in whole), problems
