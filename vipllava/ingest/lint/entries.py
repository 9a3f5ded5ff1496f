"""One record, looked at from all sides; no fault hides another, none is told twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from PIL import Image

from vipllava.conversation.label_proof import prove_labels
from vipllava.ingest.lint.findings import Finding, LintLimits, Problem
from vipllava.ingest.lint.geometry import geometry_problems
from vipllava.ingest.lint.images import extension_problems, mark_problems, read_image
from vipllava.ingest.lint.texts import (
    blank_problems,
    colour_problems,
    leftover_problems,
    placeholder_problems,
    same_words_problems,
)
from vipllava.records import find_kind
from vipllava.records.fields import Fields
from vipllava.shards.tars import Entry
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource, marks_generator, plan_sample
from vipllava.types import RecordError, Sample, VipLlavaError


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

    Args:
        entry: what lies in the shard.
        source: says data set, record kind, policy and seed; its shards are not read.
        samples: the job's.
        limits: the thresholds.
        epoch: the epoch whose words and marks are made.
    """
    kind = find_kind(entry.record, source.record_kind, entry.image is not None)
    fields = Fields(entry.record, entry.key, source.name, entry.image)
    image, image_error = read_image(fields, kind)
    problems = [] if image_error is None else [Problem(image_error.fault, str(image_error))]
    if entry.image is not None:
        problems += extension_problems(entry.image, entry.image_extension)
    problems += geometry_problems(fields, kind, limits)
    problems += placeholder_problems(entry.record, kind)
    try:
        sample = source.parse(entry, epoch)
        if not any(problem.code == "placeholder-without-region" for problem in problems):
            problems += leftover_problems(sample)
        for problem in _sample_problems(sample, fields, image, samples, limits, epoch):
            problems.append(problem)  # those before an error count
    except VipLlavaError as error:
        code = error.fault if isinstance(error, RecordError) else "record-invalid"
        if not any(problem.code == code for problem in problems):
            problems.append(Problem(code, str(error)))
    shard, key, name = str(entry.shard), entry.key, source.name
    # A message loses what the finding says anyway.
    messages = [
        problem.message.removeprefix(f"{shard}: ").removeprefix(f"{name}/{key}: ")
        for problem in problems
    ]
    return [
        Finding(problem.code, name, shard, key, message)
        for problem, message in zip(problems, messages, strict=True)
    ]


def entry_digest(entry: Entry) -> bytes:
    """Return 16 bytes that are equal for equal images and records, apart from their names.

    Fields ``id`` and ``image`` are left out: the image's bytes are compared.
    """
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
    """Look at what is made of a record that parses: marks, texts, ids and labels.

    Raises:
        VipLlavaError: nothing can be made of it.
    """
    size = (0, 0) if sample.image is None else fields.size
    rng = marks_generator(samples.seed, epoch, sample.dataset, sample.key)
    plan, turns = plan_sample(sample, size, samples.policies, rng)
    yield from same_words_problems(sample, plan)
    yield from mark_problems(plan, image, samples.transform, limits)
    yield from colour_problems(sample, plan, turns)
    yield from blank_problems(turns)
    _, encoded = samples.encode_text(sample, epoch)
    encoder = samples.conversation_encoder
    if encoded.num_dropped_turns:
        yield Problem(
            "truncated",
            f"{encoded.num_dropped_turns} of {len(turns)} turns do not fit into max_length="
            f"{encoder.max_length} and are dropped; raise it or split the conversation",
        )
    try:
        prove_labels(encoder, turns, encoded, f"{sample.dataset}/{sample.key}")
    except VipLlavaError as error:
        yield Problem("label-proof", str(error))
