"""Looking at every sample of a data set's tars, and making their indices; all damage is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vipllava.files.pools import run_jobs
from vipllava.ingest.tar_listing import find_tars, list_tar
from vipllava.records import with_kinds
from vipllava.records.image_decode import decode_image
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tar_index import index_path
from vipllava.shards.tar_members import Contents, list_samples
from vipllava.shards.tars import Entry, ShardError, ShardSet, index_shard, open_shards
from vipllava.types import RecordError

if TYPE_CHECKING:
    from vipllava.files.cache import ShardCache

VERIFY_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong."""

    shard: str  # the tar, or the data set's name for what concerns all of them
    key: str | None  # the sample; None if the whole tar is meant
    reason: str  # what is wrong and what to do


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a data set, or in one of its tars."""

    dataset: str  # the manifest's name, or the tar's path
    num_shards: int
    num_samples: int  # that were read and are whole
    num_unindexed: int  # tars without an index, whose samples could not be compared with checksums
    damages: tuple[Damage, ...]  # in the tars' order
    # members of the tars that are no part of a sample, by extension
    ignored: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """Return what ``shards verify --json`` prints."""
        return {"schema_version": VERIFY_VERSION, **asdict(self), "ok": self.ok}


def verify_shards(
    manifest: Manifest,
    data_root: str | Path,
    *,
    num_workers: int | None = None,
    decode: bool = False,
    cache: ShardCache | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Read every sample and compare it with its checksums; then open the set as training does.

    Args:
        data_root: folder or address that the manifest's patterns are relative to.
        num_workers: processes; 0 works in this one, None takes one per core, at most 16.
        decode: decode every image, too.
        cache: where tars from an address are kept.
        on_progress: told tars done and tars in all.

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
        root = Path(data_root)
        present, absent = find_tars(manifest, root)
        jobs += [root / name for name in present]
        lost = "does not exist; build it, or get it again"
        damages += [Damage(str(root / name), None, lost) for name in absent]
    verdicts: list[Verdict] = []
    with closing(run_jobs(partial(_verify_tar, decode=decode), jobs, num_workers)) as results:
        for verdict in results:
            verdicts.append(verdict)
            if on_progress is not None:
                on_progress(len(verdicts), len(jobs))
    for verdict in sorted(verdicts, key=lambda verdict: verdict.dataset):
        damages += verdict.damages
    if not remote and not any(damage.key is None for damage in damages):
        try:  # what concerns all tars together: keys that occur twice, the count
            open_shards(manifest, data_root).close()
        except ShardError as error:
            damages.append(Damage(manifest.name, None, str(error)))
    return Verdict(
        manifest.name,
        len(verdicts),
        sum(verdict.num_samples for verdict in verdicts),
        sum(verdict.num_unindexed for verdict in verdicts),
        tuple(damages),
        dict(sum((Counter(verdict.ignored) for verdict in verdicts), Counter[str]())),
    )


def _verify_tar(job: Path | tuple[ShardSet, int], *, decode: bool) -> Verdict:
    """Read all of a local tar, or of a tar of a data set at an address."""
    damages: list[Damage] = []
    reads: list[tuple[str, Callable[[], Entry]]]
    if isinstance(job, tuple):
        shards, number = job
        name, unindexed = str(shards.paths[number]), False
        end = int(shards.shard_ends[number])
        positions = range(end - shards.shard_sizes[number], end)
        reads = [(shards.key(place), partial(shards.read, place)) for place in positions]
        contents = _contents(job)
        ignored = Counter[str]()
    else:
        listing = list_tar(job, str(job))
        name, unindexed = listing.name, not index_path(job).is_file()
        damages += [
            Damage(name, problem.key or None, problem.message)
            for problem in listing.problems
            if problem.code != "index-missing"
        ]
        reads = [(key, partial(listing.read, row)) for row, key in enumerate(listing.keys)]
        contents = _contents(job) if isinstance(listing.samples, ShardSet) else None
        ignored = listing.ignored
    if contents is not None:  # an index knows neither what is not read nor what was added
        found, problems, ignored = contents
        damages += [Damage(name, problem.key or None, problem.message) for problem in problems]
        if not problems and len(found) != len(reads):
            reason = f"its index has {len(reads)} samples, the tar {len(found)}; delete the index"
            damages.append(Damage(name, None, reason))
    good = 0
    for key, read in reads:
        try:
            entry = read()
            if decode and entry.image is not None:
                decode_image(entry.image, entry.key)
            good += 1
        except (ShardError, RecordError) as error:
            damages.append(Damage(name, key, str(error)))
    return Verdict(name, 1, good, int(unindexed), tuple(damages), dict(ignored))


def _contents(job: Path | tuple[ShardSet, int]) -> Contents:
    """Read the members of a tar, be it a file or in the cache."""
    path, cache = (job, None) if isinstance(job, Path) else (job[0].paths[job[1]], job[0].cache)
    if isinstance(path, Path):
        opened = path.open("rb")
    else:
        assert cache is not None
        opened = cache.open(path)
    with opened as file:
        return list_samples(file, str(path))


@dataclass(frozen=True, slots=True)
class Indexed:
    """An index that was made, or why not."""

    path: Path  # the tar
    num_samples: int
    reason: str | None = None  # what is wrong with it


def index_shards(paths: Iterable[Path], num_workers: int | None = None) -> Iterator[Indexed]:
    """Read tars and write their indices; yields as they come, with what is wrong with a tar."""
    yield from run_jobs(with_kinds(_index_tar), list(paths), num_workers)


def _index_tar(path: Path) -> Indexed:
    try:
        return Indexed(path, len(index_shard(path)))
    except ShardError as error:
        return Indexed(path, 0, str(error))
    except OSError as error:
        return Indexed(path, 0, f"{index_path(path)} cannot be written: {error}")
