"""A whole data set: its tars, its records, and what occurs twice."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from multiprocessing import parent_process
from pathlib import Path
from typing import Final

import torch

from vipllava.files.pools import run_jobs
from vipllava.ingest.lint.entries import entry_digest, lint_entry
from vipllava.ingest.lint.findings import Finding, LintLimits, LintReport
from vipllava.ingest.tar_listing import Listing, find_tars, list_tar
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tars import ShardError, ShardSet
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.types import ConfigError, RecordError

_CHUNK: Final = 32
_Place = tuple[int, int]
"""Number of the tar, row in it."""


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
        ShardError: the data root does not exist, or the manifest is not about local shards.
        ConfigError: a negative number of processes or samples.
        WorkerDied: a process was killed.
    """
    if num_workers < 0 or (num_samples is not None and num_samples < 1):
        raise ConfigError(
            f"num_workers is {num_workers}, num_samples is {num_samples}; expected 0 or more "
            "processes and 1 or more samples"
        )
    dataset, root = manifest.name, Path(data_root)
    if manifest.format != "shards":
        raise ShardError(f"`{dataset}` is a `{manifest.format}` layout; lint reads shards")
    if any(map(is_remote, (str(data_root), *manifest.shards))):
        raise ShardError(f"`{dataset}` has tars at an address; copy them to a folder to lint them")
    if not root.is_dir():
        raise ShardError(f"data root {root} does not exist; set data_root")
    tars, absent = find_tars(manifest, root)
    lost = "does not exist; get it, or correct the manifest"
    findings = [Finding("shard-broken", dataset, name, "", lost) for name in absent]
    # Of a large data set the keys only.
    contents = [replace(list_tar(root / name, name), samples=()) for name in tars]
    by_tar = [
        [Finding(found.code, dataset, tar.name, found.key, found.message) for found in tar.problems]
        for tar in contents
    ]
    ends = list(accumulate(len(tar.keys) for tar in contents))
    total = ends[-1] if ends else 0
    whole = not any(found.code == "shard-broken" for found in chain(findings, *by_tar))
    if whole and manifest.num_samples not in (None, total):
        message = (
            f"{total} samples in {len(tars)} tars, the manifest says {manifest.num_samples}; "
            "complete the tars or correct `num_samples`"
        )
        findings.append(Finding("shard-broken", dataset, "", "", message))

    count = total if num_samples is None else min(num_samples, total)
    chosen: list[_Place] = []
    for n in range(count):
        position = (2 * n + 1) * total // (2 * count)
        number = bisect_right(ends, position)
        chosen.append((number, position - ends[number] + len(contents[number].keys)))
    chunks = [chosen[n : n + _CHUNK] for n in range(0, count, _CHUNK)]
    # Records are read by the checker; the source only parses them.
    source = SampleSource(ShardSet(dataset, (), ()), manifest.record_kind, manifest.policy, seed)
    checker = _Checker(root, tars, source, samples, limits, epoch)
    repeated = _repeated_keys(dataset, contents)
    found = {place: [finding] for place, finding in repeated.items()}
    first: dict[bytes, _Place] = {}
    results = run_jobs(checker, chunks, min(num_workers, len(chunks)), ordered=True)
    with closing(results):
        for number, result in enumerate(results):
            for place, (about_it, digest) in zip(chunks[number], result, strict=True):
                about_it = [*found.get(place, ()), *about_it]
                if digest is not None and place not in repeated:
                    earlier = first.setdefault(digest, place)
                    if earlier != place:
                        about_it.append(_same_sample(dataset, contents, place, earlier))
                if about_it:
                    found[place] = about_it
            if on_progress is not None:
                on_progress(min(count, (number + 1) * _CHUNK), count)
    for place, about_it in sorted(found.items()):
        by_tar[place[0]] += about_it
    return LintReport(dataset, total, count, (*findings, *chain.from_iterable(by_tar)))


def _repeated_keys(dataset: str, contents: Sequence[Listing]) -> dict[_Place, Finding]:
    """Return a finding for each occurrence of a key but the first."""
    first: dict[str, str] = {}
    repeated: dict[_Place, Finding] = {}
    for number, tar in enumerate(contents):
        for row, key in enumerate(tar.keys):
            if key not in first:
                first[key] = tar.name
                continue
            message = (
                f"the key is also in {first[key]}; keys are unique within a data set: remove one "
                "of the samples, or build the shards anew"
            )
            repeated[number, row] = Finding("duplicate-key", dataset, tar.name, key, message)
    return repeated


def _same_sample(
    dataset: str, contents: Sequence[Listing], later: _Place, earlier: _Place
) -> Finding:
    (shard, key), (first_shard, first_key) = (
        (contents[number].name, contents[number].keys[row]) for number, row in (later, earlier)
    )
    message = (
        f"image and record are those of {first_shard}: {first_key}; remove one, unless it is meant"
    )
    return Finding("duplicate-sample", dataset, shard, key, message)


@dataclass
class _Checker:
    """Looks at records, in this process or in several; keeps the listing of the last tar."""

    root: Path
    tars: list[str]
    source: SampleSource
    samples: SampleEncoder
    limits: LintLimits
    epoch: int
    listed: tuple[int, Listing] | None = None

    def __call__(self, places: Sequence[_Place]) -> list[tuple[list[Finding], bytes | None]]:
        """Return findings and digest of each record; without a digest it could not be read."""
        if parent_process() is not None:
            torch.set_num_threads(1)  # the processes are the parallelism
        return [self._check(*place) for place in places]

    def _check(self, number: int, row: int) -> tuple[list[Finding], bytes | None]:
        if self.listed is None or self.listed[0] != number:
            name = self.tars[number]
            self.listed = number, list_tar(self.root / name, name)
        tar = self.listed[1]
        try:
            entry = tar.read(row)
        except (ShardError, RecordError) as error:
            code = error.fault if isinstance(error, RecordError) else "shard-broken"
            message = str(error).removeprefix(f"{tar.path}: ").removeprefix(f"{tar.name}: ")
            return [Finding(code, self.source.name, tar.name, tar.keys[row], message)], None
        findings = lint_entry(entry, self.source, self.samples, self.limits, self.epoch)
        return findings, entry_digest(entry)
