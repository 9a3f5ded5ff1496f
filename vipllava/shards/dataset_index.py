"""The index of a whole data set: the indices of its tars one after the other, mapped from disk.

A folder ``NAME-DIGEST`` holds three arrays: ``tars.npy`` (``TAR``, one row per tar),
``samples.npy`` (``SAMPLE``, one row per sample) and ``keys.npy`` (the keys' bytes). It is made once
from the tars' own indices and then opened in milliseconds; ranks and workers share its pages. The
digest covers names, sizes and times of the tars' indices and the sizes of the tars, so that a
changed file leads to a new folder. It can be deleted whenever nothing runs.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vipllava.files.atomic import UNFINISHED, new_folder
from vipllava.files.locks import locked
from vipllava.shards.tar_index import (
    SAMPLE,
    SampleRow,
    ShardError,
    ShardIndex,
    ensure_index,
    index_path,
)

log = logging.getLogger(__name__)

DATASET_INDEX_VERSION: Final = 1
INDEX_FOLDER: Final = ".vipllava"
TAR: Final = np.dtype([
    ("tar_size", "<u8"), ("head_crc", "<u4"), ("content_crc", "<u4"),
    ("sample_end", "<i8"), ("key_end", "<i8"),
])  # fmt: skip
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "tars": TAR, "samples": SAMPLE, "keys": np.dtype(np.uint8),
}  # fmt: skip
_ATTEMPTS: Final = 4
_ANY: Final = "?" * 16  # a digest


@dataclass(frozen=True)
class DatasetIndex:
    """The samples of several tars as one sequence."""

    # ``TAR`` [tars]; ``sample_end`` and ``key_end`` count from the first tar
    tars: npt.NDArray[np.void]
    samples: npt.NDArray[np.void]  # ``SAMPLE`` [samples]
    keys: npt.NDArray[np.uint8]  # uint8, all keys one after the other
    folder: Path | None = None  # where the arrays lie; None if they are in memory only

    @classmethod
    def join(cls, indices: Sequence[ShardIndex]) -> DatasetIndex:
        """Join tars in memory; their keys are taken to be unique."""
        tars = np.zeros(len(indices), dtype=TAR)
        for name in ("tar_size", "head_crc", "content_crc"):
            tars[name] = [getattr(index, name) for index in indices]
        tars["sample_end"] = np.cumsum([len(index) for index in indices])
        tars["key_end"] = np.cumsum([len(index.keys) for index in indices])
        return cls(
            tars,
            np.concatenate([np.zeros(0, dtype=SAMPLE), *(index.samples for index in indices)]),
            np.concatenate([np.zeros(0, dtype=np.uint8), *(index.keys for index in indices)]),
        )

    @classmethod
    def open(cls, folder: Path) -> DatasetIndex:
        """Map the arrays of a folder; raises ShardError if it is damaged."""
        try:
            arrays: dict[str, Any] = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _DTYPES
            }
            for name, dtype in _DTYPES.items():
                if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                    raise ValueError(f"{name} is {arrays[name].dtype}")
            tars = np.array(arrays["tars"])
            ends = int(tars["sample_end"][-1]), int(tars["key_end"][-1])
            if ends != (len(arrays["samples"]), len(arrays["keys"])):
                raise ValueError("its arrays are of different lengths")
        except (ValueError, IndexError, EOFError) as error:
            raise ShardError(
                f"{folder} is damaged ({error}); delete it to have it made anew"
            ) from error
        # As plain arrays, still mapped.
        return cls(tars, np.asarray(arrays["samples"]), np.asarray(arrays["keys"]), folder)

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, position: int) -> SampleRow:
        """Return one sample's row."""
        return SampleRow._make(self.samples[position].item())

    def key(self, tar: int, position: int) -> str:
        """Return the key of the sample at ``position``, which lies in ``tar``."""
        first, base = self._start(tar)
        start = int(self.samples["key_end"][position - 1]) if position > first else 0
        end = int(self.samples["key_end"][position])
        return self.keys[base + start : base + end].tobytes().decode()

    def tar_keys(self, tar: int) -> Iterator[bytes]:
        """Yield the keys of one tar, UTF-8."""
        first, base = self._start(tar)
        last, end = int(self.tars["sample_end"][tar]), int(self.tars["key_end"][tar])
        keys = self.keys[base:end].tobytes()
        ends = self.samples["key_end"][first:last].tolist()
        yield from (keys[start:end] for start, end in zip([0, *ends], ends, strict=False))

    def find_duplicate(self) -> tuple[str, int, int] | None:
        """Return a key that occurs twice and the numbers of its tars, or None."""
        # Hashes are salted per process, and a few may be equal by chance: they only point out
        # which keys to compare.
        hashes = np.fromiter(
            (hash(key) for tar in range(len(self.tars)) for key in self.tar_keys(tar)),
            dtype=np.int64,
            count=len(self),
        )
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(np.diff(hashes[order]) == 0)
        seen: dict[str, int] = {}
        doubtful: npt.NDArray[np.intp] = np.union1d(order[equal], order[equal + 1])
        positions: list[int] = doubtful.tolist()
        for position in positions:
            tar = int(np.searchsorted(self.tars["sample_end"], position, side="right"))
            key = self.key(tar, position)
            if (first := seen.setdefault(key, tar)) != tar:
                return key, first, tar
        return None

    def _start(self, tar: int) -> tuple[int, int]:
        """Return the first sample and the first byte of the keys of a tar."""
        return self.tars[["sample_end", "key_end"]][tar - 1].item() if tar else (0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            return type(self), (self.tars, self.samples, self.keys)
        return _reopen, (self.folder,)


def _reopen(folder: Path) -> DatasetIndex:
    try:
        return DatasetIndex.open(folder)
    except OSError as error:
        raise ShardError(
            f"{folder} vanished while it was in use ({error}); start again to have it made anew"
        ) from error


def _load_all(tars: Sequence[Path | str]) -> list[ShardIndex]:
    return [ensure_index(Path(tar)) for tar in tars]


def user_index_folder() -> Path:
    """Return where indices go that cannot lie with their data."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vipllava" / "index"


def open_dataset_index(
    name: str,
    tars: Sequence[Path | str],
    *,
    homes: Sequence[Path],
    root: Path | None = None,
    load: Callable[[Sequence[Path | str]], list[ShardIndex]] = _load_all,
) -> DatasetIndex:
    """Map the index of a data set; make it if there is none for the tars as they are.

    Args:
        tars: paths, and addresses of tars that are taken never to change.
        homes: folders to look in and to write to, the first that can be written.
        root: folder that the data set may move with: paths below count relative to it.
        load: returns the tars' indices, making what is missing; by default of paths.

    Raises:
        ShardError: a tar is missing or damaged, an index belongs to another tar, or a key occurs
            in two tars.
    """
    if (index := _find(name, tars, root, homes)) is not None:
        return index
    index, folder = None, ""
    for home in homes:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = locked(home / f".{name}.lock", without="processes may build one index twice")
            with lock as held:
                # What builds that were killed left; without a lock it may be another's, under way.
                if held is not None and held.is_locked:
                    for stale in home.glob(f".{glob.escape(name)}-{_ANY}.*{UNFINISHED}"):
                        shutil.rmtree(stale, ignore_errors=True)
                if (found := _find(name, tars, root, homes)) is not None:
                    return found  # another process made it meanwhile
                if index is None:
                    index, digest = _build(tars, root, load)
                    folder = f"{name}-{digest}"
                try:
                    with new_folder(home / folder) as unfinished:
                        for array in _DTYPES:
                            np.save(unfinished / f"{array}.npy", getattr(index, array))
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # the first one stays
                        raise
                return DatasetIndex.open(home / folder)
        except OSError as error:
            log.info("no index of `%s` can be kept in %s: %s", name, home, error)
    log.warning(
        "the index of `%s` cannot be written to %s; every process makes its own and keeps it in "
        "memory",
        name,
        " or ".join(map(str, homes)),
    )
    return _build(tars, root, load)[0] if index is None else index


def _find(
    name: str, tars: Sequence[Path | str], root: Path | None, homes: Sequence[Path]
) -> DatasetIndex | None:
    digest = _digest(tars, root)
    for home in homes:
        folder = home / f"{name}-{digest}"
        try:
            return DatasetIndex.open(folder)
        except OSError:
            continue
        except ShardError as error:  # the disk was full or lost power
            log.warning("%s", error)
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _digest(tars: Sequence[Path | str], root: Path | None) -> str:
    """Return a digest of the tars' names and states."""
    states: list[Any] = [DATASET_INDEX_VERSION]
    for tar in tars:
        if isinstance(tar, str):
            states.append(tar)
            continue
        try:
            size = tar.stat().st_size
            beside = index_path(tar)
            stat = (beside if beside.is_file() else tar).stat()
        except OSError as error:
            raise ShardError(f"{tar} cannot be read: {error}") from error
        place = tar.relative_to(root) if root is not None and tar.is_relative_to(root) else tar
        states.append([str(place), size, stat.st_size, stat.st_mtime_ns])
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=8).hexdigest()


def _build(
    tars: Sequence[Path | str],
    root: Path | None,
    load: Callable[[Sequence[Path | str]], list[ShardIndex]],
) -> tuple[DatasetIndex, str]:
    """Return the joint index and the digest of the tars it was made from."""
    digest = _digest(tars, root)
    for _ in range(_ATTEMPTS):
        indices = load(tars)
        before, digest = digest, _digest(tars, root)
        if digest == before:
            break
        # An index was made or changed while they were read: read what lies there now.
    else:
        raise ShardError(f"{tars[0]} and others keep changing; wait until they are all written")
    index = DatasetIndex.join(indices)
    if (found := index.find_duplicate()) is not None:
        key, first, second = found
        raise ShardError(
            f"key `{key}` is in {tars[first]} and in {tars[second]}; keys are unique within a data "
            "set: remove one of the tars, or build them anew"
        )
    return index, digest
