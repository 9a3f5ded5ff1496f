"""A whole data set: its tars, its records, and what occurs twice."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from multiprocessing import parent_process
from pathlib import Path
from typing import BinaryIO, Final

import torch

from vipllava.files.pools import run_jobs
from vipllava.ingest.lint.entries import entry_digest, lint_entry
from vipllava.ingest.lint.findings import Finding, LintLimits
from vipllava.ingest.lint.report import LintReport
from vipllava.ingest.tar_listing import Listing, list_tar
from vipllava.shards.manifest import Manifest
from vipllava.shards.patterns import match_patterns
from vipllava.shards.tars import ShardError, ShardSet
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import ConfigError, RecordError

_CHUNK: Final = 32
_Place = tuple[int, int]
"""Number of the tar, row in it."""
_Tar = tuple[Path, str]
"""Path, and path relative to the data root, which messages use."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """What came of one record; without a digest it could not be read."""

    place: _Place
    key: str
    findings: list[Finding]
    digest: bytes | None = None


def lint_shards(
    manifest: Manifest,
    data_root: str | Path,
    samples: SampleEncoder,
    limits: LintLimits,
    seed: int,
    *,
    num_samples: int | None = None,
    num_workers: int = 0,
    epoch: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> LintReport:
    """Look at a data set, reading each tar as far as it can be read.

    Args:
        manifest: the data set; only shards are looked at.
        data_root: where its patterns start.
        samples: the job's; says how texts, marks and images are made.
        limits: the thresholds.
        seed: of the wordings, as in the job.
        num_samples: how many samples, spread evenly; None for all. Keys are compared for all.
        num_workers: processes beside this one; 0 works in this one. The report is the same.
        epoch: the epoch whose words and marks are looked at.
        on_progress: called with the samples looked at so far and to look at.

    Raises:
        ShardError: the data root does not exist, or the manifest is not about shards.
        ConfigError: a negative number of processes or samples.
        WorkerDied: a process was killed.
    """
    if num_workers < 0 or (num_samples is not None and num_samples < 1):
        raise ConfigError(
            f"num_workers is {num_workers}, num_samples is {num_samples}; expected 0 or more "
            "processes and 1 or more samples"
        )
    tars, findings = _find_tars(manifest, Path(data_root))
    contents = [replace(list_tar(*tar), rows=()) for tar in tars]  # of a large data set, only keys
    repeated = _repeated_keys(manifest.name, contents)
    ends = list(accumulate(map(len, contents)))
    total = ends[-1] if ends else 0
    whole = not any(code == "shard-broken" for tar in contents for code, _, _ in tar.faults)
    if whole and not findings and manifest.num_samples not in (None, total):
        message = (
            f"{total} samples in {len(tars)} tars, the manifest says {manifest.num_samples}; "
            "complete the tars or correct `num_samples`"
        )
        findings.append(Finding("shard-broken", manifest.name, "", "", message))

    count = total if num_samples is None else min(num_samples, total)
    chosen = [_locate((2 * n + 1) * total // (2 * count), ends) for n in range(count)]
    # Records are read by the checker; the source only parses them.
    shards = ShardSet(manifest.name, (), ())
    source = SampleSource(shards, manifest.record_kind, manifest.policy, seed)
    checker = _Checker(tars, source, samples, limits, epoch)
    told = {place: [finding] for place, finding in repeated.items()}
    first: dict[bytes, _Checked] = {}
    for checked in _check_all(checker, chosen, num_workers, on_progress):
        found = [*told.get(checked.place, ()), *checked.findings]
        if checked.digest is not None and checked.place not in repeated:
            earlier = first.setdefault(checked.digest, checked)
            if earlier is not checked:
                found.append(_same_sample(manifest.name, tars, checked, earlier))
        if found:
            told[checked.place] = found
    by_tar = [
        [Finding(code, manifest.name, tar.name, key, text) for code, key, text in tar.faults]
        for tar in contents
    ]
    for (number, _), found in sorted(told.items(), key=lambda item: item[0]):
        by_tar[number] += found
    return LintReport(manifest.name, total, count, (*findings, *chain.from_iterable(by_tar)))


def _find_tars(manifest: Manifest, root: Path) -> tuple[list[_Tar], list[Finding]]:
    """Return the tars that are there, and a finding for each pattern or name that is not."""
    if manifest.format != "shards":
        raise ShardError(f"`{manifest.name}` is a `{manifest.format}` layout; lint reads shards")
    if not root.is_dir():
        raise ShardError(f"data root {root} does not exist; set data_root")
    tars: list[_Tar] = []
    missing: list[Finding] = []
    for pattern, name, found in match_patterns(manifest.shards, root):
        tars += [(path, path.relative_to(root).as_posix()) for path in found]
        if not found:
            message = f"does not exist (pattern `{pattern}`); get it, or correct the manifest"
            missing.append(Finding("shard-broken", manifest.name, name, "", message))
    return tars, missing


def _repeated_keys(dataset: str, contents: Sequence[Listing]) -> dict[_Place, Finding]:
    """Return a finding for each occurrence of a key but the first."""
    first: dict[str, int] = {}
    repeated: dict[_Place, Finding] = {}
    for number, tar in enumerate(contents):
        for row, key in enumerate(tar.keys):
            if key not in first:
                first[key] = number
                continue
            message = (
                f"the key is also in {contents[first[key]].name}; keys are unique within a data "
                "set: remove one of the samples, or build the shards anew"
            )
            repeated[number, row] = Finding("duplicate-key", dataset, tar.name, key, message)
    return repeated


def _same_sample(dataset: str, tars: Sequence[_Tar], later: _Checked, earlier: _Checked) -> Finding:
    where = f"{tars[earlier.place[0]][1]}: {earlier.key}"
    message = f"image and record are those of {where}; remove one, unless it is meant"
    shard = tars[later.place[0]][1]
    return Finding("duplicate-sample", dataset, shard, later.key, message)


def _locate(position: int, ends: Sequence[int]) -> _Place:
    number = bisect_right(ends, position)
    return number, position - (ends[number - 1] if number else 0)


# The records, in this process or in several.


@dataclass
class _Checker:
    """Looks at records; keeps the tar of the last one open."""

    tars: list[_Tar]
    source: SampleSource
    samples: SampleEncoder
    limits: LintLimits
    epoch: int
    _opened: tuple[int, Listing, BinaryIO] | None = field(default=None, init=False)

    def __call__(self, places: Sequence[_Place]) -> list[_Checked]:
        """Look at the records at ``places``."""
        if parent_process() is not None:
            torch.set_num_threads(1)  # the processes are the parallelism
        return [self._check(place) for place in places]

    def close(self) -> None:
        """Close the tar."""
        if self._opened is not None:
            self._opened[2].close()
            self._opened = None

    def _open(self, number: int) -> tuple[Listing, BinaryIO]:
        if self._opened is None or self._opened[0] != number:
            self.close()
            path, name = self.tars[number]
            self._opened = (number, list_tar(path, name), path.open("rb"))
        return self._opened[1], self._opened[2]

    def _check(self, place: _Place) -> _Checked:
        listing, file = self._open(place[0])
        key = listing.keys[place[1]]
        try:
            entry = listing.read(file, place[1])
        except (ShardError, RecordError) as error:
            code = error.fault if isinstance(error, RecordError) else "shard-broken"
            message = str(error).removeprefix(f"{listing.path}: ").removeprefix(f"{listing.name}: ")
            finding = Finding(code, self.source.name, listing.name, key, message)
            return _Checked(place, key, [finding])
        findings = lint_entry(entry, self.source, self.samples, self.limits, self.epoch)
        return _Checked(place, key, findings, entry_digest(entry))


def _check_all(
    checker: _Checker,
    chosen: Sequence[_Place],
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[_Checked]:
    """Yield what came of each chosen record, in order."""
    chunks = [chosen[n : n + _CHUNK] for n in range(0, len(chosen), _CHUNK)]
    results = run_jobs(checker, chunks, min(num_workers, len(chunks)), ordered=True)
    done = 0
    with closing(checker), closing(results):
        for checked in results:
            yield from checked
            done += len(checked)
            if on_progress is not None:
                on_progress(done, len(chosen))
