"""One traced sample as values to show: the image, the marks and the conversation from its ids.

Texts are decoded from ids, so whoever reads them has seen what is trained; only those of dropped
turns, which no id holds, are the record's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.label_proof import prove_labels
from vipllava.conversation.pieces import Before
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleTrace
from vipllava.types import (
    IGNORE_INDEX,
    FixedVisualPrompt,
    Mention,
    Region,
    Turn,
    VipLlavaError,
    VisualPrompt,
)
from vipllava.visual_prompts.render import mark_opacity

_UNREADABLE: Final = "\ufffd"

Ids = npt.NDArray[np.int64]
Kind = Literal["text", "special", "image"]


@dataclass(frozen=True, slots=True)
class ShownToken:
    """The least stretch of ids that writes whole characters; mostly one id."""

    # ``text``, ``special`` (a token of the tokenizer's own, e.g. ``</s>``), or ``image``: all
    # positions of one image.
    kind: Kind
    text: str  # what the ids write; empty for an image and for the tokenizer's dummy prefix
    ids: tuple[int, ...]  # in order
    from_template: bool = False  # written by the chat template rather than by the record


@dataclass(frozen=True, slots=True)
class Stretch:
    """An unbroken run of ids that are all supervised, or all not."""

    supervised: bool
    tokens: tuple[ShownToken, ...]

    @property
    def num_ids(self) -> int:
        """Positions of the run."""
        return sum(len(token.ids) for token in self.tokens)

    @property
    def text(self) -> str:
        """What the run writes, special tokens spelt out, without the image."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True, slots=True)
class ShownMark:
    """One mark of the plan."""

    prompt: VisualPrompt  # how it is drawn; widths in pixels of the stored image
    region: Region  # what it marks, pixels of the stored image
    # width and height of what is painted, pixels of the network's input; None if nothing of it is
    # left there
    input_size: tuple[float, float] | None
    named_in: tuple[int, ...]  # turns that name it, counted from 1, dropped ones included
    # what the record itself fixes about it (``shape``, ``colour``, ``width``, ``alpha``)
    fixed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """What the network gets of one sample, and which of it carries loss."""

    key: str  # the record's key in its shard
    dataset: str
    shard: str  # the tar it lies in, as it is to be shown
    record_kind: str
    policy: str
    stored_size: tuple[int, int] | None  # of the stored image, pixels; None for text only
    image: Image.Image | None  # the network's input, RGB; None for text only
    marks: tuple[ShownMark, ...]  # in drawing order
    stretches: tuple[Stretch, ...]  # the whole conversation, in order
    num_turns: int  # that it holds
    dropped: tuple[Turn, ...]  # turns beyond the length limit, from the record
    max_length: int  # that limit, ids
    is_cut: bool = False  # the last turn that it holds may end before its end, at the limit
    fault: str = ""  # why the labels could not be proved to be the answers; empty if they were

    @property
    def num_ids(self) -> int:
        """Positions of the whole conversation."""
        return sum(stretch.num_ids for stretch in self.stretches)

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss."""
        return sum(stretch.num_ids for stretch in self.stretches if stretch.supervised)

    @property
    def num_image_ids(self) -> int:
        """Positions that the image takes."""
        tokens = (token for stretch in self.stretches for token in stretch.tokens)
        return sum(len(token.ids) for token in tokens if token.kind == "image")


@dataclass(frozen=True, slots=True)
class RefusedSample:
    """A sample that training would refuse, and why; else as :class:`InspectedSample`."""

    key: str
    dataset: str
    shard: str
    reason: str


def inspect_trace(
    trace: SampleTrace,
    encoder: ConversationEncoder,
    transform: ImageTransform,
    *,
    shard: str,
    record_kind: str,
) -> InspectedSample:
    """Turn a traced sample into what is shown of it, with what encoded and transformed it."""
    sample, encoded, pixels = trace.sample, trace.encoded, trace.pixel_values
    num_kept = len(trace.turns) - encoded.num_dropped_turns
    fault = ""
    try:
        prove_labels(encoder, trace.turns, encoded, key=f"{sample.dataset}/{sample.key}")
    except VipLlavaError as error:
        fault = str(error)
    return InspectedSample(
        key=sample.key,
        dataset=sample.dataset,
        shard=shard,
        record_kind=record_kind,
        policy=sample.policy,
        stored_size=None if trace.image is None else trace.image.size,
        image=None if pixels is None else Image.fromarray(pixels.permute(1, 2, 0).numpy()),
        marks=tuple(_mark(trace, transform, prompt) for prompt in trace.plan.prompts),
        stretches=_stretches(trace, encoder, trace.turns[:num_kept]),
        num_turns=num_kept,
        dropped=trace.turns[num_kept:],
        max_length=encoder.max_length,
        is_cut=encoded.is_cut,
        fault=fault,
    )


def _mark(trace: SampleTrace, transform: ImageTransform, prompt: VisualPrompt) -> ShownMark:
    sample = trace.sample
    fixed = sample.fixed[prompt.region] if sample.fixed else FixedVisualPrompt()
    mention = Mention(prompt.region)
    return ShownMark(
        prompt,
        sample.regions[prompt.region],
        _size_in_input(prompt, trace.plan.size, transform),
        tuple(n for n, turn in enumerate(sample.turns, start=1) if mention in turn.parts),
        tuple(name for name, value in asdict(fixed).items() if value is not None),
    )


def _size_in_input(
    prompt: VisualPrompt, size: tuple[int, int], transform: ImageTransform
) -> tuple[float, float] | None:
    painted = mark_opacity(prompt, size)
    if painted is None or (bounds := painted[0].getbbox()) is None:
        return None
    (left, top), (x1, y1, x2, y2) = painted[1], bounds
    box = transform.map_box((x1 + left, y1 + top, x2 + left, y2 + top), size)
    x1, y1, x2, y2 = (min(max(value, 0.0), float(transform.size)) for value in box)
    return None if x1 >= x2 or y1 >= y2 else (x2 - x1, y2 - y1)


def _stretches(
    trace: SampleTrace, encoder: ConversationEncoder, kept: Sequence[Turn]
) -> tuple[Stretch, ...]:
    ids = trace.encoded.input_ids
    supervised = trace.encoded.labels != IGNORE_INDEX
    from_template = ~supervised & ~_typed(encoder, kept, ids)
    edges = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(ids)]
    return tuple(
        Stretch(bool(supervised[start]), tuple(_tokens(encoder, ids, start, end, from_template)))
        for start, end in itertools.pairwise(edges)
    )


def _tokens(
    encoder: ConversationEncoder,
    ids: Ids,
    start: int,
    end: int,
    from_template: npt.NDArray[np.bool_],
) -> Iterator[ShownToken]:
    specials = encoder.tokenizer.backend_tokenizer.get_added_tokens_decoder()

    def kind_of(token_id: int) -> Kind:
        if token_id == encoder.image_token_id:
            return "image"
        return "special" if token_id in specials else "text"

    for kind, run in itertools.groupby(ids[start:end].tolist(), kind_of):
        whole = np.array(list(run))
        if kind == "text":
            groups = _readable(encoder, whole, encoder.what_stands_before(ids, start))
        elif kind == "image":
            groups = [("", whole)]
        else:
            groups = [(specials[int(token_id)].content, token_id[None]) for token_id in whole]
        for text, group in groups:
            fixed = bool(from_template[start : start + len(group)].all())
            yield ShownToken(kind, text, tuple(group.tolist()), fixed)
            start += len(group)


def _readable(encoder: ConversationEncoder, ids: Ids, before: Before) -> list[tuple[str, Ids]]:
    """Cut ids of text into the shortest groups that write whole characters.

    A character outside the vocabulary is several tokens of a byte each. They belong together if
    the stretch, cut between them, no longer reads as it does in one piece.
    """
    whole = encoder.decode(ids, before)
    groups: list[tuple[str, Ids]] = []
    start, here = 0, before
    for end in range(1, len(ids) + 1):
        text = encoder.decode(ids[start:end], here)
        if _UNREADABLE in text and end < len(ids):
            rest = encoder.decode(ids[end:])
            if text + rest != encoder.decode(ids[start:], here):
                continue
        groups.append((text, ids[start:end]))
        start, here = end, Before.TEXT
    # A tokenizer whose tokens write other things alone than together: the text comes first.
    return groups if "".join(text for text, _ in groups) == whole else [(whole, ids)]


def _typed(encoder: ConversationEncoder, kept: Sequence[Turn], ids: Ids) -> npt.NDArray[np.bool_]:
    """Return which positions hold the users' texts; bool [length].

    What stays the same when a question is replaced by two others is not the question's.
    """
    typed = np.zeros(len(ids), dtype=np.bool_)
    for index in range(0, len(kept), 2):
        questions = (kept[index], *(replace(kept[index], text=text) for text in ("a", "b")))
        versions = [encoder.encode_generation_prompt([*kept[:index], turn]) for turn in questions]
        head = _num_common(versions)
        tail = _num_common([version[::-1] for version in versions])
        typed[head : len(versions[0]) - tail] = True
    return typed


def _num_common(versions: Sequence[Ids]) -> int:
    """Return the length of the beginning that all versions share."""
    shortest = min(map(len, versions))
    same = np.all([version[:shortest] == versions[0][:shortest] for version in versions], axis=0)
    return int(np.logical_and.accumulate(same).sum())
