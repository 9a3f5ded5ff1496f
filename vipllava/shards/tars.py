"""WebDataset tars with a sidecar index: written once, read by seek.

Per sample ``KEY.json`` (the record) and, unless it is text only, ``KEY.jpg|jpeg|png|webp``. Beside
``NAME.tar`` lies ``NAME.index.npz`` with the place, size and checksum of every member, so that
any sample is two reads away and a changed file is noticed. The tars stay plain: any WebDataset
reader opens them. ``docs/storage.md`` describes the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import braceexpand
import numpy as np
import numpy.typing as npt

from vipllava.files.cache import ShardCache
from vipllava.files.retries import ONCE, BrokenError, GivenUpError, Patience, Trial, retry
from vipllava.shards.dataset_index import (
    INDEX_FOLDER,
    DatasetIndex,
    open_dataset_index,
    user_index_folder,
)
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.remote import expand_address, load_indices
from vipllava.shards.tar_index import (
    MOST,
    ShardError,
    ShardIndex,
    build_index,
    index_path,
    parse_object,
    save_index,
    tar_name,
)
from vipllava.shards.tar_members import BLOCK, IMAGE_EXTENSIONS
from vipllava.shards.writing import write_shards as write_shards
from vipllava.types import RecordError, StorageError

_OPEN_FILES: Final = 64
_OPEN_CACHED: Final = 24  # an open copy takes room even after the cache has dropped it


class DamagedError(ShardError, RecordError):
    """The bytes of a sample are not the indexed ones: a fault of the data, in every run."""

    def __init__(self, message: str) -> None:
        RecordError.__init__(self, message, "shard-broken")


class UnreadableError(ShardError, StorageError):
    """A tar that was there when the data set was opened cannot be opened or read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample as it lies in a shard."""

    key: str  # unique within the data set
    record: Mapping[str, Any]  # the JSON object
    image: bytes | None  # encoded; None for a text-only record
    # as in the tar, without the dot; the bytes may be of another format
    image_extension: str | None
    shard: Path | str  # the tar's path or address, for messages
    # width and height of the upright image, pixels, where the index knows them
    image_size: tuple[int, int] | None = None


def index_shard(path: str | Path) -> ShardIndex:
    """Write the index of a tar beside it; raises ShardError as :func:`.tar_index.build_index`."""
    index = build_index(Path(path))
    save_index(index, index_path(Path(path)))
    return index


class ShardSet:
    """The tars of one data set as one sequence.

    The index is mapped from disk and shared by all processes; a few files are open per process.
    Threads may read at the same time. It can be forked and sent to other processes. Made by
    :func:`open_shards`, which checks the tars.

    Args:
        paths: of the tars; an address as text.
        index: of all of them, or theirs one by one.
        cache: where tars at an address are kept; None if all are files.
        patience: how long a tar is tried that cannot be opened or read.

    Attributes:
        shard_ends: int64 [shards], number of samples up to the end of each tar.
        shard_sizes: number of samples in each tar.
        tar_sizes: int64 [shards], bytes of each tar.
    """

    def __init__(
        self,
        name: str,
        paths: Iterable[Path | str],
        index: DatasetIndex | Sequence[ShardIndex],
        *,
        cache: ShardCache | None = None,
        patience: Patience = ONCE,
    ) -> None:
        self.name = name
        self.paths = tuple(paths)
        self.index = index if isinstance(index, DatasetIndex) else DatasetIndex.join(index)
        self.shard_ends: npt.NDArray[np.int64] = self.index.tars["sample_end"].astype(np.int64)
        self.shard_sizes: tuple[int, ...] = tuple(np.diff(self.shard_ends, prepend=0).tolist())
        self.tar_sizes: npt.NDArray[np.int64] = self.index.tars["tar_size"].astype(np.int64)
        self._ends: list[int] = self.shard_ends.tolist()
        self.cache = cache
        self.patience = patience
        self._open = lru_cache(_OPEN_FILES if cache is None else _OPEN_CACHED)(_open)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the name and the tars' names, sizes and content, wherever they lie."""
        names, contents = map(tar_name, self.paths), self.index.tars["content_crc"].tolist()
        parts = list(zip(names, self.tar_sizes.tolist(), contents, strict=True))
        return hashlib.blake2b(json.dumps([self.name, parts]).encode(), digest_size=8).hexdigest()

    def locate(self, position: int) -> tuple[int, int]:
        """Return the shard's number and the row within it."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} samples in `{self.name}`")
        shard = bisect_right(self._ends, position)
        return shard, position - (self._ends[shard - 1] if shard else 0)

    def key(self, position: int) -> str:
        """Return the key of the sample at ``position``."""
        return self.index.key(self.locate(position)[0], position)

    def keys(self) -> Iterator[str]:
        """Yield every key in shard order."""
        for shard in range(len(self.paths)):
            yield from (key.decode() for key in self.index.tar_keys(shard))

    def text_tokens(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return what :func:`.tar_index.estimate_tokens` says of samples, int32 [n]."""
        return self.index.samples["text_tokens"][positions].astype(np.int32)

    def has_image(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which samples have an image, bool [n]."""
        return self.index.samples["image_block"][positions] > 0

    def image_sizes(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return widths and heights of upright images, pixels, int32 [n, 2]; 0 for none."""
        sides = [self.index.samples[name][positions] for name in ("width", "height")]
        return np.stack(sides, axis=-1).astype(np.int32)

    def record_offset(self, position: int) -> int:
        """Return where the record lies in its tar, bytes."""
        return self.index.row(position).record_block * BLOCK

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have tars fetched that will be read soon; returns at once."""
        if self.cache is not None:
            chosen = (self.paths[shard] for shard in shards)
            self.cache.prefetch([path for path in chosen if isinstance(path, str)])

    def read(self, position: int) -> Entry:
        """Read the sample at ``position``.

        Raises:
            DamagedError: the tar's bytes are not the indexed ones, or the record is no JSON object.
            UnreadableError: the tar could not be opened or read in all the time that it is tried.
            CacheError: the tar cannot be fetched.
        """
        shard, _ = self.locate(position)
        path, key = self.paths[shard], self.index.key(shard, position)
        row = self.index.row(position)
        text = self._read(shard, key, "record", row.record_block, row.record_size, row.record_crc)
        try:
            record = parse_object(text, f"{path}: {key}.json")
        except ShardError as error:  # so it was indexed by something else
            raise DamagedError(str(error)) from error
        if not row.image_block:
            return Entry(key, record, None, None, path)
        image = self._read(shard, key, "image", row.image_block, row.image_size, row.image_crc)
        known = 0 < row.width < MOST and row.height < MOST
        image_size = (row.width, row.height) if known else None
        return Entry(key, record, image, IMAGE_EXTENSIONS[row.extension], path, image_size)

    def close(self) -> None:
        """Close the files this process holds open."""
        self._open.cache_clear()

    def _read(self, shard: int, key: str, kind: str, block: int, size: int, crc: int) -> bytes:
        """Read a member of a tar and compare it with its index."""
        path, offset = self.paths[shard], block * BLOCK
        trial = Trial(self.patience)

        def attempt() -> bytes:
            try:
                file = self._open(path, int(self.tar_sizes[shard]), self.cache)
                return file.read(offset, size)
            except OSError as error:
                self.close()  # a file server that has forgotten a file knows a new one
                raise BrokenError(str(error)) from error

        try:
            data = retry(attempt, trial, str(path))
        except GivenUpError as error:
            raise UnreadableError(
                f"{path} cannot be read: {error.reason} ({trial}). Check the disk or the mount "
                "that it lies on and its permissions, and restore the tar if it is gone; then "
                "start again"
            ) from error.reason
        if len(data) == size and zlib.crc32(data) == crc:
            return data
        if isinstance(path, Path):
            name = index_path(path).name
            remedy = "Restore the tar, or delete the index to have it made anew"
        else:
            name = f"the index in {self.index.folder}"
            assert self.cache is not None
            remedy = (
                f"Delete the copy {self.cache.path(path)} to have it fetched again; if the tar was "
                "replaced at its address, the index, too"
            )
        raise DamagedError(
            f"{path}: {kind} of sample `{key}` (bytes {offset}..{offset + size}) is not what "
            f"{name} recorded: the tar was damaged or replaced. {remedy}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": self._open.cache_parameters()["maxsize"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(state["_open"])(_open)


class _OpenFile:
    """A file that stays open as long as someone holds this object."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read at a place, without a position that threads or processes would share."""
        data = b""
        while len(data) < size:
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data = data + more if data else more
        return data


def _open(path: Path | str, size: int, cache: ShardCache | None) -> _OpenFile:
    if isinstance(path, Path):
        return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    assert cache is not None
    with cache.open(path, size=size) as copy:
        return _OpenFile(os.dup(copy.fileno()))


def open_shards(
    manifest: Manifest,
    data_root: str | Path,
    *,
    cache: ShardCache | None = None,
    patience: Patience = ONCE,
) -> ShardSet:
    """Open a data set's tars and check that they are the ones the manifest means.

    A tar without an index is read once and indexed.

    Args:
        manifest: names the tars.
        data_root: folder or address that its patterns are relative to.
        cache: where tars at an address are kept; has a patience of its own.
        patience: how long a tar is tried that cannot be opened or read later on.

    Raises:
        ShardError: folder or tar missing, a tar truncated or broken, an index that belongs to
            another tar, a key that occurs twice, a count other than the manifest's, or an address
            and no cache.
        CacheError: a tar at an address cannot be fetched.
    """
    if manifest.format != "shards":
        raise ShardError(f"`{manifest.name}` is a `{manifest.format}` layout, not shards")
    tars = list(_find_tars(manifest, data_root))
    if any(isinstance(tar, str) for tar in tars):
        if cache is None:
            raise ShardError(
                f"`{manifest.name}` has tars at an address and no cache: set cache_dir, or copy "
                "them into a folder and set data_root to it"
            )
        home = cache.directory / "index"
        load = partial(load_indices, cache=cache, folder=home / "tars")
        index = open_dataset_index(manifest.name, tars, homes=[home], load=load)
    else:
        root, cache = Path(data_root), None
        digest = hashlib.blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()
        homes = [root / INDEX_FOLDER, user_index_folder() / digest]
        index = open_dataset_index(manifest.name, tars, homes=homes, root=root)
    if manifest.num_samples is not None and manifest.num_samples != len(index):
        raise ShardError(
            f"`{manifest.name}` has {len(index)} samples in {len(tars)} tars under {data_root}, "
            f"its manifest says {manifest.num_samples}; complete the tars or correct `num_samples`"
        )
    return ShardSet(manifest.name, tars, index, cache=cache, patience=patience)


def match_patterns(
    patterns: Iterable[str], data_root: Path
) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield a pattern, each name that its braces make, and the files that this one stands for.

    Names may have wildcards; the files are sorted, and none if nothing is there.
    """
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            paths = [data_root / name]
            if re.search(r"[*?\[]", name):
                paths = sorted(data_root.glob(name))
            yield pattern, name, [path for path in paths if path.is_file()]


def _remedy(manifest: Manifest) -> str:
    ways = [f"`vipllava data fetch {manifest.name}`"] if manifest.sources else []
    if manifest.made_by == "sample_world":
        ways = ["`vipllava sample-data`"]
    if manifest.annotation_file:
        ways.append(f"`vipllava shards build {manifest.name}`")
    return f"set data_root, or run {' and '.join(ways)}" if ways else "set data_root"


def _find_tars(manifest: Manifest, data_root: str | Path) -> Iterator[Path | str]:
    """Yield the tars of a manifest; a brace names each one, so each has to be there."""
    place, root = str(data_root), Path(data_root)
    for pattern in manifest.shards:
        if is_remote(pattern):
            yield from expand_address(pattern, manifest.name)
        elif is_remote(place):
            yield from expand_address(f"{place.rstrip('/')}/{pattern}", manifest.name)
        elif not root.is_dir():
            raise ShardError(f"data root {root} does not exist; {_remedy(manifest)}")
        else:
            for _, name, tars in match_patterns([pattern], root):
                if not tars:
                    raise ShardError(
                        f"`{manifest.name}`: {root / name} does not exist (pattern `{pattern}`); "
                        f"{_remedy(manifest)}"
                    )
                yield from tars
