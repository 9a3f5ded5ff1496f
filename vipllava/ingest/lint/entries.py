"""One record, looked at from all sides; no fault hides another, none is told twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from vipllava.conversation.label_proof import prove_labels
from vipllava.ingest.lint.findings import Finding, LintLimits, Problem
from vipllava.ingest.lint.geometry import geometry_problems
from vipllava.ingest.lint.images import extension_problems, read_image
from vipllava.ingest.lint.marks import mark_problems
from vipllava.ingest.lint.texts import (
    blank_answers,
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
    lint = _EntryLint(entry, source, samples, limits, epoch)
    lint.run()
    return lint.findings


def entry_digest(entry: Entry) -> bytes:
    """Return 16 bytes that are equal for equal images and records, apart from their names.

    Fields ``id`` and ``image`` are left out: the image's bytes are compared.
    """
    record = {name: entry.record[name] for name in entry.record if name not in ("id", "image")}
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    digest.update(b"-" if entry.image is None else hashlib.blake2b(entry.image).digest())
    return digest.digest()


@dataclass
class _EntryLint:
    """The findings of one record in the making."""

    entry: Entry
    source: SampleSource
    samples: SampleEncoder
    limits: LintLimits
    epoch: int
    findings: list[Finding] = field(default_factory=list[Finding])

    def run(self) -> None:
        """Look at the record as it is stored, then at what is made of it."""
        entry, name = self.entry, self.source.name
        kind = find_kind(entry.record, self.source.record_kind, entry.image is not None)
        fields = Fields(entry.record, entry.key, name, entry.image)
        image, error = read_image(fields, kind)
        if error is not None:
            self._add_error(error)
        if entry.image is not None:
            self._add(extension_problems(entry.image, entry.image_extension))
        self._add(geometry_problems(fields, kind, self.limits))
        self._add(placeholder_problems(entry.record, kind))
        try:
            sample = self.source.parse(entry, self.epoch)
            if not self._has("placeholder-without-region"):
                self._add(leftover_problems(sample))
            self._look_at_sample(sample, fields, image)
        except VipLlavaError as error:
            self._add_error(error)

    def _look_at_sample(self, sample: Sample, fields: Fields, image: Image.Image | None) -> None:
        """Look at what is made of a record that parses: marks, texts, ids and labels.

        Raises:
            VipLlavaError: nothing can be made of it.
        """
        samples = self.samples
        size = (0, 0) if sample.image is None else fields.size
        rng = marks_generator(samples.seed, self.epoch, sample.dataset, sample.key)
        plan, turns = plan_sample(sample, size, samples.policies, rng)
        self._add(same_words_problems(sample, plan))
        self._add(mark_problems(plan, image, samples.transform, self.limits))
        self._add(colour_problems(sample, plan, turns))
        if blank := blank_answers(turns):
            message = f"the answer of turn {', '.join(map(str, blank))} is blank; remove the turn"
            self._add([Problem("unsupervised", message)])
        _, encoded = samples.encode_text(sample, self.epoch)
        if encoded.num_dropped_turns:
            limit = samples.conversation_encoder.max_length
            message = (
                f"{encoded.num_dropped_turns} of {len(turns)} turns do not fit into max_length="
                f"{limit} and are dropped; raise it or split the conversation"
            )
            self._add([Problem("truncated", message)])
        try:
            prove_labels(
                samples.conversation_encoder, turns, encoded, f"{sample.dataset}/{sample.key}"
            )
        except VipLlavaError as error:
            self._add([Problem("label-proof", str(error))])

    def _has(self, code: str) -> bool:
        return any(finding.code == code for finding in self.findings)

    def _add(self, problems: Iterable[Problem]) -> None:
        """Add problems; a message loses what the finding says anyway."""
        shard, key, name = str(self.entry.shard), self.entry.key, self.source.name
        for problem in problems:
            text = problem.message.removeprefix(f"{shard}: ").removeprefix(f"{name}/{key}: ")
            self.findings.append(Finding(problem.code, name, shard, key, text))

    def _add_error(self, error: VipLlavaError) -> None:
        """Add what stopped the record, unless it has been found already."""
        code = error.fault if isinstance(error, RecordError) else "record-invalid"
        if not self._has(code):
            self._add([Problem(code, str(error))])
