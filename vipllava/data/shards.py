"""WebDataset tars with a sidecar index: written once, read by seek.

Per sample ``KEY.json`` (the record) and, unless it is text only, ``KEY.jpg|jpeg|png|webp``. Beside
``NAME.tar`` lies ``NAME.index.npz`` with the place, size and checksum of every member, so that
any sample is two reads away and a changed file is noticed. The tars stay plain: any WebDataset
reader opens them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import braceexpand
from webdataset.writer import TarWriter

from vipllava.data.image_decode import image_size
from vipllava.data.manifest import Manifest
from vipllava.data.shard_index import (
    IMAGE_EXTENSIONS,
    ShardError,
    ShardIndex,
    build_index,
    index_path,
    load_index,
    save_index,
)
from vipllava.types import RecordError

__all__ = [
    "IMAGE_EXTENSIONS",
    "Entry",
    "ShardError",
    "ShardSet",
    "index_shard",
    "open_shards",
    "read_entry",
    "write_shards",
]

log = logging.getLogger(__name__)

_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
_LONGEST_KEY: Final = 90  # with an extension below the 100 bytes of a plain tar header
_OPEN_FILES: Final = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample as it lies in a shard.

    Attributes:
        key: unique within the data set.
        record: the JSON object.
        image: the encoded picture, or None for a text-only record.
        image_extension: as in the tar, without the dot; the bytes may be of another format.
        shard: the tar's path, for messages.
    """

    key: str
    record: Mapping[str, Any]
    image: bytes | None
    image_extension: str | None
    shard: Path


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, Any], bytes | None, str | None]],
    directory: str | Path,
    *,
    prefix: str = "shard",
    max_samples: int = 1000,
    max_bytes: int = 1 << 30,
    check_images: bool = True,
) -> list[Path]:
    """Write samples as tars with their indices.

    The same samples give the same bytes (fixed times and owners). A tar appears under its final
    name only when it is whole.

    Args:
        samples: key, record, encoded picture or None, the picture's extension or None. A key has
            letters, digits, ``_``, ``-`` and ``/`` only: WebDataset cuts names at the first dot.
        directory: made if missing; must hold no tars of this prefix yet.
        prefix: tars are called ``PREFIX-000000.tar`` and so on.
        max_samples: samples per tar.
        max_bytes: a tar is closed once its members reach this size.
        check_images: refuse a picture whose header cannot be read.

    Returns:
        The tars' paths, in order.

    Raises:
        RecordError: a key, record or picture that cannot be stored, naming the key.
        ShardError: the folder already holds tars of this prefix.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if present := sorted(directory.glob(f"{prefix}-*.tar")):
        raise ShardError(
            f"{directory} already holds {len(present)} tars called {prefix}-*.tar; "
            "remove them or choose another folder: old and new would be read as one data set"
        )
    paths: list[Path] = []
    seen: set[str] = set()
    stream = iter(samples)
    item = next(stream, None)
    while item is not None:
        path = directory / f"{prefix}-{len(paths):06d}.tar"
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with (
                partial.open("wb") as file,
                TarWriter(file, encoder=False, mtime=0) as writer,
            ):
                count = size = 0
                while item is not None and count < max_samples and size < max_bytes:
                    members = _members(*item, seen=seen, check_images=check_images)
                    size += writer.write(members)
                    count += 1
                    item = next(stream, None)
            index = build_index(partial, name=path.name)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        save_index(index, index_path(path))
        paths.append(path)
    if not paths:
        raise ShardError(f"no sample was given for {directory}; an empty data set is never meant")
    return paths


def _members(
    key: str,
    record: Mapping[str, Any],
    image: bytes | None,
    extension: str | None,
    *,
    seen: set[str],
    check_images: bool,
) -> dict[str, str | bytes]:
    """Check one sample and return its tar members."""
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise RecordError(
            f"key `{key}` cannot be stored; use at most {_LONGEST_KEY} letters, digits, `_`, `-` "
            "and `/`"
        )
    if key in seen:
        raise RecordError(f"key `{key}` was given twice; keys are unique within a data set")
    seen.add(key)
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise RecordError(f"record of key `{key}` is not JSON: {error}") from error
    members: dict[str, str | bytes] = {"__key__": key, "json": text.encode()}
    if image is None:
        return members
    if extension not in IMAGE_EXTENSIONS:
        raise RecordError(
            f"picture of key `{key}` has extension {extension!r}; "
            f"expected one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    if check_images:
        image_size(image, key=key)
    return {**members, extension: image}


def index_shard(path: str | Path) -> ShardIndex:
    """Read a whole tar, check it, and write its index beside it.

    Raises:
        ShardError: the tar is missing, truncated or broken, or a sample in it is none.
    """
    index = build_index(Path(path))
    save_index(index, index_path(Path(path)))
    return index


def read_entry(file: BinaryIO, index: ShardIndex, row: int, *, shard: Path) -> Entry:
    """Read one sample by seek.

    Args:
        file: the tar, opened for reading.
        index: its index.
        row: position of the sample within the tar.
        shard: the tar's path, for messages.

    Raises:
        ShardError: the bytes are not the indexed ones, or the record is no JSON object.
    """
    key = index.key(row)

    def member(kind: str, offset: int, size: int, checksum: int) -> bytes:
        file.seek(offset)
        data = file.read(size)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ShardError(
                f"{shard}: {kind} of sample `{key}` (bytes {offset}..{offset + size}) is not what "
                f"{index_path(shard).name} recorded: the tar was damaged or replaced. Restore the "
                "tar, or delete the index to have it made anew"
            )
        return data

    text = member(
        "record",
        int(index.record_offset[row]),
        int(index.record_size[row]),
        int(index.record_crc[row]),
    )
    record: Any = json.loads(text)
    if not isinstance(record, dict):
        raise ShardError(
            f"{shard}: {key}.json holds {type(record).__name__}; a record is a JSON object. "
            "Correct the record and build the shard again"
        )
    image = None
    if index.has_image(row):
        image = member(
            "picture",
            int(index.image_offset[row]),
            int(index.image_size[row]),
            int(index.image_crc[row]),
        )
    extension = index.extension(row)
    return Entry(key, cast("dict[str, Any]", record), image, extension, shard)


class ShardSet:
    """The tars of one data set as one sequence.

    Holds the indices in memory and a few files open per process; safe to send to workers.
    """

    def __init__(self, name: str, paths: Iterable[Path], indices: Iterable[ShardIndex]) -> None:
        """Join tars; use :func:`open_shards`, which checks them."""
        self.name = name
        self.paths = tuple(paths)
        self.indices = tuple(indices)
        self._ends = list(accumulate(len(index) for index in self.indices))
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tars' names, sizes and first bytes: other data, other digest."""
        parts = [
            (p.name, i.tar_size, i.head_crc) for p, i in zip(self.paths, self.indices, strict=True)
        ]
        return f"{zlib.crc32(repr((self.name, parts)).encode()):08x}"

    def locate(self, position: int) -> tuple[int, int]:
        """Return the shard's number and the row within it."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} samples in `{self.name}`")
        shard = bisect_right(self._ends, position)
        return shard, position - (self._ends[shard - 1] if shard else 0)

    def key(self, position: int) -> str:
        """Return the key of the sample at ``position``."""
        shard, row = self.locate(position)
        return self.indices[shard].key(row)

    def keys(self) -> Iterator[str]:
        """Yield every key in shard order."""
        for index in self.indices:
            yield from index.iter_keys()

    def read(self, position: int) -> Entry:
        """Read the sample at ``position``.

        Raises:
            ShardError: the tar is gone or its bytes are not the indexed ones.
        """
        shard, row = self.locate(position)
        return read_entry(self._open(shard), self.indices[shard], row, shard=self.paths[shard])

    def verify(self) -> None:
        """Read every sample once.

        Raises:
            ShardError: the first damaged sample.
        """
        for position in range(len(self)):
            self.read(position)

    def close(self) -> None:
        """Close the files this process holds open."""
        while self._files:
            self._files.popitem()[1].close()

    def _open(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():  # forked: the parent's files share their position
            self.close()
            self._process = os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            file = self.paths[shard].open("rb")
        except OSError as error:
            raise ShardError(f"{self.paths[shard]} cannot be opened: {error}") from error
        self._files[shard] = file
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file

    def __del__(self) -> None:
        """Close the files; a set that was never finished has none."""
        if "_files" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when sent to another process."""
        return {**self.__dict__, "_files": OrderedDict(), "_process": -1}


def open_shards(manifest: Manifest, data_root: str | Path) -> ShardSet:
    """Open a data set's tars and check that they are the ones the manifest means.

    A tar without an index is read once and indexed.

    Raises:
        ShardError: folder or tar missing, a tar truncated or broken, an index that belongs to
            another tar, a key that occurs twice, or a count other than the manifest's.
    """
    root = Path(data_root)
    if manifest.format != "shards":
        raise ShardError(f"`{manifest.name}` is a `{manifest.format}` layout, not shards")
    if not root.is_dir():
        raise ShardError(f"data root {root} does not exist; {_remedy(manifest)}")
    paths = [path for pattern in manifest.shards for path in _expand(pattern, root, manifest)]
    indices = [_load_or_build(path) for path in paths]
    shards = ShardSet(manifest.name, paths, indices)
    seen: dict[str, int] = {}
    for number, index in enumerate(indices):
        for key in index.iter_keys():
            if (first := seen.setdefault(key, number)) != number:
                raise ShardError(
                    f"key `{key}` is in {paths[first]} and in {paths[number]}; keys are unique "
                    "within a data set: remove one of the tars, or build them anew"
                )
    if manifest.num_samples is not None and manifest.num_samples != len(shards):
        raise ShardError(
            f"`{manifest.name}` has {len(shards)} samples in {len(paths)} tars under {root}, its "
            f"manifest says {manifest.num_samples}; complete the tars or correct `num_samples`"
        )
    return shards


def _remedy(manifest: Manifest) -> str:
    if manifest.made_by == "sample_world":
        return "the sample data is made on first use by train.py and evaluate.py"
    named = ", ".join(source.name for source in manifest.sources) or "see its manifest"
    return f"set paths.data_root, or get `{manifest.name}` from: {named}"


def _expand(pattern: str, root: Path, manifest: Manifest) -> list[Path]:
    """Resolve one pattern; a brace names each tar, so each has to be there."""
    paths: list[Path] = []
    for name in braceexpand.braceexpand(pattern):
        found = sorted(root.glob(name)) if re.search(r"[*?\[]", name) else [root / name]
        if not found or not all(path.is_file() for path in found):
            raise ShardError(
                f"`{manifest.name}`: {root / name} does not exist (pattern `{pattern}`); "
                f"{_remedy(manifest)}"
            )
        paths.extend(found)
    return paths


def _load_or_build(path: Path) -> ShardIndex:
    sidecar = index_path(path)
    if not sidecar.is_file():
        log.info("%s has no index; reading it once to make one", path)
        index = build_index(path)
        try:
            save_index(index, sidecar)
        except OSError as error:  # a read-only data folder still works, only slower next time
            log.warning("%s could not be written (%s); the index is kept in memory", sidecar, error)
        return index
    return load_index(sidecar, path)
