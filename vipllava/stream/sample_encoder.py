"""The way of one sample: shard -> record -> plan -> image and text -> ids and pixels.

    entry    = shards.read(position)                         bytes and JSON
    sample   = parse_record(..., rng=words)                  regions, turns with mentions
    plan     = sample_plan(sample.regions, size, rng=marks)  what is drawn, what it is called
    image    = render_plan(decode_image(...), plan)          RGB with marks
    turns    = refer_turns(sample.turns, plan, rng=marks)    texts with the marks' words
    encoded  = conversation_encoder.encode(turns)            int64 ids and labels [length]
    pixels   = transform(image)                              uint8 [3, size, size]

Words and marks have a generator each, keyed by (seed, epoch, data set, key): a sample is the same
in any process, worker or order, and another wording never moves a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from vipllava.conversation.encode import ConversationEncoder
from vipllava.files.cache import ShardCache
from vipllava.files.retries import ONCE, Patience
from vipllava.keyed_random import generator_for
from vipllava.records import KINDS, Kinds, RecordKind, parse_record
from vipllava.records.image_decode import decode_image, image_size, naming_in_memory_errors
from vipllava.shards.manifest import AUTO_POLICY, Manifest
from vipllava.shards.tars import Entry, ShardSet, open_shards
from vipllava.stream.collate import Collator, EncodedSample
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import Encoded, RecordError, Sample, Turn, VipLlavaError, VisualPromptPlan
from vipllava.visual_prompts.policies import VisualPromptPolicy, get_policy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import refer_turns


def words_generator(seed: int, epoch: int, dataset: str, key: str) -> np.random.Generator:
    """Return the generator that chooses a sample's wordings."""
    return generator_for(seed, epoch, dataset, key, "words")


def marks_generator(seed: int, epoch: int, dataset: str, key: str) -> np.random.Generator:
    """Return the generator that samples a sample's marks."""
    return generator_for(seed, epoch, dataset, key, "marks")


@dataclass(eq=False)
class SampleSource:
    """The samples of one data set, drafted for any (epoch, position)."""

    shards: ShardSet  # the opened tars
    record_kind: str | RecordKind  # of every record, or ``auto``
    policy: str  # of every sample, or ``auto``: the record kind's own
    seed: int  # of wordings and marks
    upright: bool = True  # whether images are turned as their EXIF blocks say
    # A spawned worker knows the registered ones, because they travel with its sources.
    kinds: Kinds = field(default_factory=lambda: KINDS, init=False, repr=False)

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        data_root: str | Path,
        seed: int,
        *,
        cache: ShardCache | None = None,
        patience: Patience = ONCE,
    ) -> Self:
        """Open the shards of a manifest; see :func:`vipllava.shards.tars.open_shards`."""
        shards = open_shards(manifest, data_root, cache=cache, patience=patience)
        return cls(
            shards, manifest.record_kind, manifest.policy, seed, manifest.apply_exif_orientation
        )

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.shards.name

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.shards)

    def sample(self, position: int, epoch: int = 0) -> Sample:
        """Read and parse one sample.

        Raises:
            RecordError: the record breaks its schema, or the tar is damaged there; names shard, key
                and field.
            StorageError: the tar cannot be read or fetched.
        """
        return self.parse(self.shards.read(position), epoch)

    def parse(self, entry: Entry, epoch: int = 0) -> Sample:
        """Parse what was read."""
        try:
            sample = parse_record(
                entry.record,
                key=entry.key,
                dataset=self.name,
                image=entry.image,
                kind=self.record_kind,
                rng=words_generator(self.seed, epoch, self.name, entry.key),
                size=entry.image_size if self.upright else None,  # the index knows upright ones
                upright=self.upright,
            )
        except RecordError as error:
            raise error.at(entry.shard) from error
        return sample if self.policy == AUTO_POLICY else replace(sample, policy=self.policy)

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples of epoch 0 in shard order."""
        return map(self.sample, range(len(self)))


def plan_sample(
    sample: Sample,
    size: tuple[int, int],
    policies: Mapping[str, VisualPromptPolicy],
    rng: np.random.Generator,
    change: Callable[[VisualPromptPlan], VisualPromptPlan] | None = None,
) -> tuple[VisualPromptPlan, tuple[Turn, ...]]:
    """Sample the marks of one sample and write its texts from them.

    Args:
        sample: a parsed record.
        size: width and height of its stored image, pixels; any for a text-only sample.
        policies: by the names that samples carry.
        rng: see :func:`marks_generator`.
        change: makes another plan of the sampled one, before any text is written from it.

    Raises:
        RecordError: the regions cannot be told apart, or a mention has no region.
        VipLlavaError: the sample's policy is not among ``policies``.
    """
    plan = VisualPromptPlan(size)
    try:
        if sample.regions:
            policy = get_policy(policies, sample.policy)
            plan = sample_plan(sample.regions, size, policy, rng, sample.fixed)
        if change is not None:
            plan = change(plan)
        return plan, refer_turns(sample.turns, plan, rng)
    except VipLlavaError as error:
        raise error.at(_name(sample)) from error


@dataclass(frozen=True, slots=True)
class SampleTrace:
    """Everything that is made of one sample on its way to the network."""

    sample: Sample  # the parsed record
    plan: VisualPromptPlan  # its marks
    turns: tuple[Turn, ...]  # its texts, with the marks' words
    encoded: Encoded  # ids and labels
    # The decoded image without marks, RGB; None for a text-only sample.
    image: Image.Image | None
    # Uint8 [3, size, size] as the network gets it, marks drawn; None likewise.
    pixel_values: torch.Tensor | None


@dataclass(eq=False)
class SampleEncoder:
    """Marks, writes, encodes and transforms samples."""

    policies: Mapping[str, VisualPromptPolicy]  # by the names that samples carry
    conversation_encoder: ConversationEncoder  # conversations to ids and labels
    transform: ImageTransform  # images to pixels
    seed: int  # of the marks

    def __post_init__(self) -> None:
        self.policies = dict(self.policies)  # workers get it pickled, which a proxy cannot be

    def collator(self, *, multiple_of: int = 1, pack_length: int | None = None) -> Collator:
        """Return what makes rows of these samples; for the arguments see :class:`Collator`."""
        encoder = self.conversation_encoder
        token: Any = getattr(encoder.tokenizer, "pad_token_id", None)
        if token is None or token == encoder.image_token_id:
            token = 0  # padding has no label and is never attended to
        return Collator(int(token), self.transform.size, multiple_of, pack_length)

    def encode_text(self, sample: Sample, epoch: int = 0) -> tuple[tuple[Turn, ...], Encoded]:
        """Return texts and ids without decoding the image; equal to what training gets."""
        size = (0, 0)
        if sample.image is not None:
            size = image_size(sample.image, key=_name(sample), upright=sample.upright)
        return self._encode(sample, size, epoch)[1:]

    def encode(self, sample: Sample, epoch: int = 0) -> EncodedSample:
        """Return the finished sample; raises what :meth:`trace` raises."""
        trace = self.trace(sample, epoch)
        return EncodedSample(_name(sample), trace.encoded, trace.pixel_values, sample.dataset)

    def trace(self, sample: Sample, epoch: int = 0) -> SampleTrace:
        """Return the finished sample with all that led to it.

        Raises:
            RecordError: an unreadable image, regions that cannot be told apart, or a conversation
                without a supervised token; names data set and key.
            VipLlavaError: there is not enough memory; names data set and key.
        """
        name, image, pixels = _name(sample), None, None
        if sample.image is not None:
            image = decode_image(sample.image, name, upright=sample.upright)
        size = (0, 0) if image is None else image.size
        plan, turns, encoded = self._encode(sample, size, epoch)
        if image is not None:
            with naming_in_memory_errors(name):
                pixels = self.transform(render_plan(image, plan))
        return SampleTrace(sample, plan, turns, encoded, image, pixels)

    def _encode(
        self, sample: Sample, size: tuple[int, int], epoch: int
    ) -> tuple[VisualPromptPlan, tuple[Turn, ...], Encoded]:
        name, marks = _name(sample), marks_generator(self.seed, epoch, sample.dataset, sample.key)
        plan, turns = plan_sample(sample, size, self.policies, marks)
        encoded = self.conversation_encoder.encode(turns, key=name)
        if encoded.num_supervised == 0:
            raise RecordError(
                f"{name}: no token is supervised; expected an answer within the length limit",
                "unsupervised",
            )
        if encoded.num_images != (sample.image is not None):
            raise RecordError(
                f"{name}: the conversation places {encoded.num_images} images, the sample has "
                f"{int(sample.image is not None)}; the turn with the image was lost"
            )
        return plan, turns, encoded


def _name(sample: Sample) -> str:
    return f"{sample.dataset}/{sample.key}"
