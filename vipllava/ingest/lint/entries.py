"""One record, looked at from all sides; no fault hides another, none is told twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from PIL import Image

from vipllava.conversation.label_proof import prove_labels
from vipllava.ingest.lint.findings import Finding, LintLimits
from vipllava.ingest.lint.geometry import geometry_faults
from vipllava.ingest.lint.marks import mark_faults
from vipllava.ingest.lint.pictures import extension_faults, read_picture
from vipllava.ingest.lint.texts import (
    DIALOGUES,
    blank_answers,
    colour_faults,
    leftover_faults,
    placeholder_faults,
    same_words_faults,
)
from vipllava.records import AUTO, kind_of
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

    Picture, boxes, polygons and placeholders are looked at in the record itself, each alone; what
    marks and labels show needs a record that parses. Words and marks are those of one epoch.

    Args:
        entry: what lies in the shard.
        source: says data set, record kind, policy and seed; its shards are not read.
        samples: the job's.
        limits: the thresholds.
        epoch: the epoch whose words and marks are made.
    """
    return _EntryLint(entry, source, samples, limits, epoch).run()


def entry_digest(entry: Entry) -> bytes:
    """Return 16 bytes that are equal for equal pictures and records, apart from their names.

    Fields ``id`` and ``image`` are left out: the picture's bytes are compared.
    """
    record = {name: entry.record[name] for name in entry.record if name not in ("id", "image")}
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    digest.update(b"-" if entry.image is None else hashlib.blake2b(entry.image).digest())
    return digest.digest()


class _EntryLint:
    """The findings of one record in the making."""

    def __init__(
        self,
        entry: Entry,
        source: SampleSource,
        samples: SampleEncoder,
        limits: LintLimits,
        epoch: int,
    ) -> None:
        self.entry, self.source, self.samples = entry, source, samples
        self.limits, self.epoch = limits, epoch
        self.name = f"{source.name}/{entry.key}"
        self.findings: list[Finding] = []

    def run(self) -> list[Finding]:
        """Look, and return the findings."""
        entry = self.entry
        kind = _kind(entry, self.source.record_kind)
        fields = Fields(entry.record, entry.key, self.source.name, entry.image)
        picture, error = read_picture(fields, kind)
        if error is not None:
            self._add_error(error)
        if entry.image is not None:
            self._add(extension_faults(entry.image, entry.image_extension))
        self._add(geometry_faults(fields, kind, self.limits))
        self._add(placeholder_faults(entry.record, kind))
        try:
            sample = self.source.parse(entry, self.epoch)
        except RecordError as error:
            self._add_error(error)
            return self.findings
        if kind not in DIALOGUES and not self._has("placeholder-without-region"):
            self._add(leftover_faults(sample))
        self._look_at_sample(sample, fields, picture)
        return self.findings

    def _look_at_sample(self, sample: Sample, fields: Fields, picture: Image.Image | None) -> None:
        """Look at what is made of a record that parses: marks, texts, ids and labels."""
        samples = self.samples
        try:
            size = (0, 0) if sample.image is None else fields.size
            rng = marks_generator(samples.seed, self.epoch, sample.dataset, sample.key)
            plan, turns = plan_sample(sample, size, samples.policies, rng)
        except VipLlavaError as error:
            self._add_error(error)
            return
        self._add(same_words_faults(sample, plan))
        self._add(mark_faults(plan, picture, samples.transform, self.limits))
        self._add(colour_faults(sample, plan, turns))
        blank = blank_answers(turns)
        if blank:
            listed = ", ".join(map(str, blank))
            self._add([("unsupervised", f"the answer of turn {listed} is blank; remove the turn")])
        try:
            _, encoded = samples.encode_text(sample, self.epoch)
        except RecordError as error:
            self._add_error(error)
            return
        if encoded.num_dropped_turns:
            limit = samples.encoder.max_length
            message = (
                f"{encoded.num_dropped_turns} of {len(turns)} turns do not fit into max_length="
                f"{limit} and are dropped; raise stage.max_length or split the conversation"
            )
            self._add([("truncated", message)])
        try:
            prove_labels(samples.encoder, turns, encoded, self.name)
        except VipLlavaError as error:
            self._add([("label-proof", str(error))])

    def _has(self, code: str) -> bool:
        return any(finding.code == code for finding in self.findings)

    def _add(self, faults: Iterable[tuple[str, str]]) -> None:
        """Add faults; a message loses what the finding says anyway."""
        for code, message in faults:
            text = message.removeprefix(f"{self.entry.shard}: ").removeprefix(f"{self.name}: ")
            shard = str(self.entry.shard)
            self.findings.append(Finding(code, self.source.name, shard, self.entry.key, text))

    def _add_error(self, error: VipLlavaError) -> None:
        """Add what stopped the record, unless it has been found already."""
        code = error.fault if isinstance(error, RecordError) else "record-invalid"
        if not self._has(code):
            self._add([(code, str(error))])


def _kind(entry: Entry, record_kind: str) -> str:
    """Return the record's kind as the parser chooses it."""
    if record_kind != AUTO:
        return record_kind
    kind = kind_of(entry.record)
    return "image_level" if kind == "text_only" and entry.image is not None else kind
