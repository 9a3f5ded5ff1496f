"""A whole data set: its tars, each record from all sides, and what occurs twice."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from multiprocessing import parent_process
from pathlib import Path
from typing import Final

import torch
from PIL import Image

from vipllava.conversation.label_proof import prove_labels
from vipllava.files.pools import run_jobs
from vipllava.ingest.lint.findings import Finding, LintLimits, LintReport, Problem
from vipllava.ingest.lint.image_rules import image_problems, read_image
from vipllava.ingest.lint.rules import (
    blank_problems,
    colour_problems,
    geometry_problems,
    image_placeholder_problems,
    leftover_problems,
    mark_problems,
    placeholder_problems,
    same_words_problems,
)
from vipllava.ingest.tar_listing import Listing, find_tars, list_tar
from vipllava.records import find_kind
from vipllava.records.box_form import box_form, box_signs
from vipllava.records.fields import Fields
from vipllava.shards.manifest import Manifest, is_remote
from vipllava.shards.tars import Entry, ShardError, ShardSet
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource, marks_generator, plan_sample
from vipllava.types import ConfigError, RecordError, Sample, VipLlavaError

_CHUNK: Final = 32
_ONCE: Final = "field-unread"
_Place = tuple[int, int]
"""Number of the tar, row in it."""
_Checked = tuple[list[Finding], bytes | None, Counter[str]]
"""Findings, digest (None: it could not be read) and the signs of the boxes of one record."""


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
        manifest: the data set; only shards are looked at, those at an address are findings.
        data_root: folder that its patterns are relative to.
        samples: the job's; says how texts, marks and images are made.
        seed: of the wordings, as in the job.
        num_samples: how many samples, spread evenly; None for all. Keys are compared for all.
        num_workers: processes beside this one; 0 works in this one. The report is the same.
        epoch: the epoch whose words and marks are looked at.
        on_progress: called with the samples looked at so far and to look at.

    Raises:
        ShardError: the data root is no folder, or the manifest is not about shards.
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
    copy = "is an address; copy the tars to a folder to lint them"
    if is_remote(str(data_root)):
        raise ShardError(f"`{dataset}`: data root {data_root} {copy}")
    if not root.is_dir():
        raise ShardError(f"data root {root} does not exist; set data_root")
    tars, absent = find_tars(manifest, root)
    lost = "does not exist; get it, or correct the manifest"
    findings = [Finding("shard-broken", dataset, name, "", lost) for name in absent]
    remote = filter(is_remote, manifest.shards)
    findings += [Finding("shard-broken", dataset, name, "", copy) for name in remote]
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
    upright = manifest.apply_exif_orientation
    source = SampleSource(
        ShardSet(dataset, (), ()), manifest.record_kind, manifest.policy, seed, upright
    )
    checker = _Checker(root, tars, source, samples, limits, epoch)
    repeated = _repeated_keys(dataset, contents)
    found = {place: [finding] for place, finding in repeated.items()}
    first: dict[bytes, str] = {}
    told: set[str] = set()  # of fields that are not read
    signs: Counter[str] = Counter()
    results = run_jobs(checker, chunks, num_workers, ordered=True)
    with closing(results):
        for number, result in enumerate(results):
            for place, (about_it, digest, its_signs) in zip(chunks[number], result, strict=True):
                signs += its_signs
                about_it = [f for f in about_it if f.code != _ONCE or f.message not in told]
                told.update(finding.message for finding in about_it if finding.code == _ONCE)
                about_it = [*found.get(place, ()), *about_it]
                if digest is not None and place not in repeated:
                    shard, key = contents[place[0]].name, contents[place[0]].keys[place[1]]
                    here = f"{shard}: {key}"
                    if (earlier := first.setdefault(digest, here)) != here:
                        message = (
                            f"image and record are those of {earlier}; remove one, unless it is "
                            "meant"
                        )
                        about_it.append(Finding("duplicate-sample", dataset, shard, key, message))
                if about_it:
                    found[place] = about_it
            if on_progress is not None:
                on_progress(min(count, (number + 1) * _CHUNK), count)
    if (form := box_form(signs)) is not None:
        findings.append(Finding("box-form", dataset, "", "", form))
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

    def __call__(self, places: Sequence[_Place]) -> list[_Checked]:
        """Look at each record."""
        if parent_process() is not None:
            torch.set_num_threads(1)  # the processes are the parallelism
        return [self._check(*place) for place in places]

    def _check(self, number: int, row: int) -> _Checked:
        if self.listed is None or self.listed[0] != number:
            name = self.tars[number]
            self.listed = number, list_tar(self.root / name, name)
        tar = self.listed[1]
        try:
            entry = tar.read(row)
        except (ShardError, RecordError) as error:
            code = error.fault if isinstance(error, RecordError) else "shard-broken"
            message = str(error).removeprefix(f"{tar.path}: ").removeprefix(f"{tar.name}: ")
            finding = Finding(code, self.source.name, tar.name, tar.keys[row], message)
            return [finding], None, Counter()
        findings = lint_entry(entry, self.source, self.samples, self.limits, self.epoch)
        return findings, entry_digest(entry), _entry_signs(entry, self.source)


def lint_entry(
    entry: Entry,
    source: SampleSource,
    samples: SampleEncoder,
    limits: LintLimits,
    epoch: int = 0,
) -> list[Finding]:
    """Return every fault of one record.

    Image, boxes, polygons and placeholders are looked at in the record itself, each alone; what
    marks and labels show needs a record that parses. Words and marks are those of one epoch.

    Of ``source`` data set, record kind, policy and seed count; its shards are not read.
    """
    kind = find_kind(entry.record, source.record_kind, entry.image is not None)
    given = kind.given(entry.record)
    fields = Fields(given, entry.key, source.name, entry.image, upright=source.upright)
    image, image_error = read_image(fields, kind)
    problems = [] if image_error is None else [Problem(image_error.fault, str(image_error))]
    problems += image_problems(fields, kind, image, entry.image_extension, limits)
    problems += geometry_problems(fields, kind, limits)
    problems += [Problem("field-unread", message) for message in kind.unread(given)]
    problems += placeholder_problems(given, kind)
    try:
        sample = source.parse(entry, epoch)
        if not any(problem.code == "placeholder-without-region" for problem in problems):
            problems += leftover_problems(sample)
        problems += image_placeholder_problems(sample)
        for problem in _sample_problems(sample, fields, image, samples, limits, epoch):
            problems.append(problem)  # those before an error count
    except VipLlavaError as error:
        code = error.fault if isinstance(error, RecordError) else "record-invalid"
        if not any(problem.code == code for problem in problems):
            problems.append(Problem(code, str(error)))
    shard, key, name = str(entry.shard), entry.key, source.name
    findings: list[Finding] = []
    for code, message in problems:  # which loses what the finding says anyway
        message = message.removeprefix(f"{shard}: ").removeprefix(f"{name}/{key}: ")
        findings.append(Finding(code, name, shard, key, message))
    return findings


def _entry_signs(entry: Entry, source: SampleSource) -> Counter[str]:
    """Count what the boxes of a record look like; none where its image cannot be read."""
    kind = find_kind(entry.record, source.record_kind, entry.image is not None)
    fields = Fields(kind.given(entry.record), entry.key, source.name, entry.image)
    try:
        return box_signs(kind.outlines(fields.record), fields.size)
    except RecordError:
        return Counter()


def entry_digest(entry: Entry) -> bytes:
    """Return 16 bytes that are equal for equal images and records, apart from their names."""
    record = {name: entry.record[name] for name in entry.record if name not in ("id", "image")}
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    digest.update(b"-" if entry.image is None else hashlib.blake2b(entry.image).digest())
    return digest.digest()


def _sample_problems(
    sample: Sample,
    fields: Fields,
    image: Image.Image | None,
    samples: SampleEncoder,
    limits: LintLimits,
    epoch: int,
) -> Iterator[Problem]:
    """Look at what is made of a record that parses: marks, texts, ids and labels."""
    size = (0, 0) if sample.image is None else fields.size
    rng = marks_generator(samples.seed, epoch, sample.dataset, sample.key)
    plan, turns = plan_sample(sample, size, samples.policies, rng)
    yield from same_words_problems(sample, plan)
    yield from mark_problems(plan, image, samples.transform, limits)
    yield from colour_problems(sample, plan, turns)
    yield from blank_problems(turns)
    _, encoded = samples.encode_text(sample, epoch)
    encoder = samples.conversation_encoder
    if encoded.is_truncated:
        num_kept = len(turns) - encoded.num_dropped_turns
        end = (
            f", and turn {num_kept} or the token that ends it is cut off" if encoded.is_cut else ""
        )
        yield Problem(
            "truncated",
            f"{encoded.num_dropped_turns} of {len(turns)} turns do not fit into max_length="
            f"{encoder.max_length} and are dropped{end}; raise it or split the conversation",
        )
    try:
        prove_labels(encoder, turns, encoded, f"{sample.dataset}/{sample.key}")
    except VipLlavaError as error:
        yield Problem("label-proof", str(error))
