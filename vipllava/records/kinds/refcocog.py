"""RefCOCOg: a short phrase that describes the marked object, or GPT-4V's dialogue about it.

``{"bboxes": [1], "segmentations": [1], "answer"}``, or instead of ``answer`` ``conversations`` in
which ``<bbox>`` stands for the mark. ``answer`` is a phrase, or a list of all that people have said
of the object: training draws one of them, the benchmark takes them as references.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import CONVERSATIONS, RecordKind, boxes_and_masks
from vipllava.records.kinds.dialogues import parse_marked
from vipllava.records.wording import OR, choose, exchange, fill
from vipllava.types import Mention

_GENERIC_RATE: Final = 0.25

_MARKED: Final = (
    "What is the object {}? Answer with a short phrase.",
    "Describe the object {} in a short phrase.",
    "Give a short phrase for the object {}.",
    "Name the object {}. Reply with a short descriptive phrase.",
    "Write a short phrase that describes the object {}.",
    "In a short phrase, what is the object {}?",
)
_GENERIC: Final = (
    "What is the marked object? Answer with a short phrase.",
    "Describe the marked object in a short phrase.",
    "Give a short phrase for the object that the visual prompt marks.",
    "Which object does the visual prompt mark? Reply with a short descriptive phrase.",
    "Write a short phrase that describes the marked region.",
)


def parse_refcocog(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask for the marked object; a quarter of the questions do not say what the mark looks like."""
    regions = fields.regions(count=1, masks=True)
    phrases = fields.texts("answer")
    generic = rng.random() < _GENERIC_RATE
    question = (choose(_GENERIC, rng),) if generic else fill(choose(_MARKED, rng), Mention(0))
    return Parsed(exchange(question, choose(phrases, rng)), regions)


def parse_refcocog_caption(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask for the marked object, in the same words each time; any of the phrases is right."""
    regions = fields.regions(count=1)
    return Parsed(exchange(fill(_MARKED[0], Mention(0)), OR.join(fields.texts("answer"))), regions)


REFCOCOG = RecordKind(
    "refcocog",
    parse_refcocog,
    texts=("answer",),
    policy="refcocog",
    prefix="refcocog",
    fields=("bboxes", "segmentations", "answer"),
    outlines=partial(boxes_and_masks, all_masks=True),
)
REFCOCOG_CAPTION = replace(
    REFCOCOG, name="refcocog_caption", parse=parse_refcocog_caption, prefix=None
)
REFCOCOG_GPT4V = replace(
    REFCOCOG,
    name="refcocog-gpt4v",
    parse=partial(parse_marked, count=1, masks=True),
    texts=(CONVERSATIONS,),
    fields=("bboxes", "segmentations", CONVERSATIONS),
    prefix="refcocog-gpt4v",
    mentions=(CONVERSATIONS, "bboxes"),
)
