"""The tars of a data set that are there, and what lies in one, as far as it can be read.

Training takes a tar whole or not at all. Lint and verify read on: what is whole in a broken tar, or
in one without an index, is looked at like everything else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import ShardError, index_path, load_index, parse_object
from vipllava.shards.tar_members import Members, TarProblem, list_samples, read_member
from vipllava.shards.tars import Entry, ShardSet, match_patterns
from vipllava.types import RecordError


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

    path: Path
    name: str  # for messages
    keys: tuple[str, ...]  # of the samples, in the tar's order
    problems: tuple[TarProblem, ...]  # of the tar as a whole
    # the tar by its index, or the members of a tar that has none of its own
    samples: ShardSet | tuple[Members, ...]
    # members by extension that are not read; not known of a tar that is listed by its index
    ignored: Counter[str] = field(default_factory=Counter[str])

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
            text = read_member(file, members["record"])
            data = image and read_member(file, image)
        try:
            record = parse_object(text, f"{key}.json")
        except ShardError as error:
            raise RecordError(str(error)) from error
        return Entry(key, record, data, image and image.extension, shard)


def list_tar(path: Path, name: str) -> Listing:
    """List a tar, which messages call ``name``, by its index, or by itself if none fits."""
    if (sidecar := index_path(path)).is_file():
        try:
            shards = ShardSet(name, [path], [load_index(sidecar, path)])
            return Listing(path, name, tuple(shards.keys()), (), shards)
        except ShardError as error:
            problem = TarProblem(str(error))
    else:
        message = f"no index {sidecar.name}; the next job reads the whole tar to make it"
        problem = TarProblem(message, code="index-missing")
    try:
        with path.open("rb") as file:
            samples, problems, ignored = list_samples(file, name)
    except OSError as error:
        samples, problems, ignored = [], [TarProblem(f"cannot be read: {error}")], Counter[str]()
    keys, members = tuple(key for key, _ in samples), tuple(found for _, found in samples)
    # What is wrong with the tar explains a bad index, and keeps a missing one from being made.
    return Listing(path, name, keys, tuple(problems or [problem]), members, ignored)
