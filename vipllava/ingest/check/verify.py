"""Looking at every sample of a data set's tars, and making their indices; all damage is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.files.pools import default_num_workers, run_jobs
from vipllava.ingest.check.availability import find_tars
from vipllava.ingest.tar_listing import list_tar
from vipllava.records import with_kinds
from vipllava.records.image_decode import decode_image
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import Entry, ShardError, ShardSet, index_shard, open_shards
from vipllava.types import RecordError

if TYPE_CHECKING:
    from vipllava.files.cache import ShardCache

VERIFY_VERSION: Final = 1
Progress = Callable[[int, int], None]
"""Told tars done and tars in all."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        shard: the tar, or the data set's name for what concerns all of them.
        key: the sample; None if the whole tar is meant.
        reason: what is wrong and what to do.
    """

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a data set.

    Attributes:
        dataset: the manifest's name.
        num_shards: tars.
        num_samples: samples that were read and are whole.
        num_unindexed: tars without an index, whose samples could not be compared with checksums.
        damages: everything that is wrong, in the tars' order.
    """

    dataset: str
    num_shards: int
    num_samples: int
    num_unindexed: int
    damages: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """Return what ``shards verify --json`` prints."""
        return {"schema_version": VERIFY_VERSION, **asdict(self), "ok": self.ok}


@dataclass(frozen=True, slots=True)
class _TarVerdict:
    """What was found in one tar; without an index there are no checksums."""

    shard: str
    num_samples: int
    is_indexed: bool
    damages: tuple[Damage, ...]


def verify_shards(
    manifest: Manifest,
    data_root: str | Path,
    *,
    num_workers: int | None = None,
    decode: bool = False,
    cache: ShardCache | None = None,
    on_progress: Progress | None = None,
) -> Verdict:
    """Read every sample and compare it with its checksums; then open the set as training does.

    Args:
        manifest: the data set.
        data_root: folder or address that its patterns are relative to.
        num_workers: processes; 0 works in this one, None takes one per core, at most 16.
        decode: decode every picture, too.
        cache: where tars from an address are kept.
        on_progress: told about the progress.

    Raises:
        ShardError: tars from an address cannot be opened; with a local data root everything that
            is wrong is in the verdict.
    """
    jobs: list[Path | tuple[ShardSet, int]] = []
    damages: list[Damage] = []
    remote = is_remote(str(data_root)) or any(map(is_remote, manifest.shards))
    if remote:
        shards = open_shards(manifest, data_root, cache=cache)
        jobs += [(shards, number) for number in range(len(shards.paths))]
    else:
        present, absent = find_tars(manifest, Path(data_root))
        jobs += [Path(data_root) / name for name in present]
        lost = "does not exist; build it, or get it again"
        damages += [Damage(str(Path(data_root) / name), None, lost) for name in absent]
    workers = default_num_workers() if num_workers is None else num_workers
    verdicts: list[_TarVerdict] = []
    work = partial(_verify_tar, decode=decode)
    with closing(run_jobs(work, jobs, min(workers, len(jobs)))) as results:
        for verdict in results:
            verdicts.append(verdict)
            if on_progress is not None:
                on_progress(len(verdicts), len(jobs))
    verdicts.sort(key=lambda verdict: verdict.shard)
    damages += [damage for verdict in verdicts for damage in verdict.damages]
    if not remote and not any(damage.key is None for damage in damages):
        try:  # what concerns all tars together: keys that occur twice, the count
            open_shards(manifest, data_root).close()
        except ShardError as error:
            damages.append(Damage(manifest.name, None, str(error)))
    return Verdict(
        dataset=manifest.name,
        num_shards=len(verdicts),
        num_samples=sum(verdict.num_samples for verdict in verdicts),
        num_unindexed=sum(not verdict.is_indexed for verdict in verdicts),
        damages=tuple(damages),
    )


def _verify_tar(job: Path | tuple[ShardSet, int], *, decode: bool) -> _TarVerdict:
    """Read all of a local tar, or of a tar of a data set at an address."""
    if isinstance(job, tuple):
        shards, number = job
        ends = [0, *shards.shard_ends.tolist()]
        positions = range(ends[number], ends[number + 1])
        reads = ((shards.key(place), partial(shards.read, place)) for place in positions)
        return _read_all(str(shards.paths[number]), True, [], reads, decode)
    listing = list_tar(job, str(job))
    damages = [
        Damage(listing.name, key or None, text)
        for code, key, text in listing.faults
        if code != "index-missing"
    ]
    indexed = index_path(job).is_file()
    if not listing.keys:
        return _TarVerdict(listing.name, 0, indexed, tuple(damages))
    with job.open("rb") as file:
        reads = ((key, partial(listing.read, file, row)) for row, key in enumerate(listing.keys))
        return _read_all(listing.name, indexed, damages, reads, decode)


def _read_all(
    shard: str,
    indexed: bool,
    damages: list[Damage],
    reads: Iterable[tuple[str, Callable[[], Entry]]],
    decode: bool,
) -> _TarVerdict:
    good = 0
    for key, read in reads:
        try:
            entry = read()
            if decode and entry.image is not None:
                decode_image(entry.image, entry.key)
        except (ShardError, RecordError) as error:
            damages.append(Damage(shard, key, str(error)))
        else:
            good += 1
    return _TarVerdict(shard, good, indexed, tuple(damages))


@dataclass(frozen=True, slots=True)
class Indexed:
    """An index that was made, or why not.

    Attributes:
        path: the tar.
        num_samples: in it; 0 if it could not be indexed.
        reason: what is wrong with it, or None.
    """

    path: Path
    num_samples: int
    reason: str | None = None


def index_shards(paths: Iterable[Path], num_workers: int | None = None) -> Iterator[Indexed]:
    """Read tars and write their indices; yields as they come, with what is wrong with a tar."""
    tars = list(paths)
    workers = default_num_workers() if num_workers is None else num_workers
    yield from run_jobs(with_kinds(_index_tar), tars, min(workers, len(tars)))


def _index_tar(path: Path) -> Indexed:
    try:
        return Indexed(path, len(index_shard(path)))
    except ShardError as error:
        return Indexed(path, 0, str(error))
    except OSError as error:
        return Indexed(path, 0, f"{index_path(path)} cannot be written: {error}")
