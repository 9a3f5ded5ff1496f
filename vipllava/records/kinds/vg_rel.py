"""Visual Genome relations: how the first marked object relates to the second.

``{"bboxes": [2], "answer"}``, the answer being the triplet as text, or instead of it GPT-4V's
``conversations`` with ``<bbox0>`` and ``<bbox1>``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import CONVERSATIONS, RecordKind, boxes
from vipllava.records.kinds.dialogues import parse_marked
from vipllava.records.wording import choose, exchange, fill
from vipllava.types import Mention

_QUESTIONS: Final = (
    "How does the subject {} relate to the object {}? Answer with a short triplet (subject, "
    "relation, object).",
    "Name the relation of the subject {} to the object {} as a short triplet (subject, relation, "
    "object).",
    "What is the relation between the subject {} and the object {}? Give a short triplet (subject, "
    "relation, object).",
    "Write a short triplet (subject, relation, object) for the subject {} and the object {}.",
    "Look at the subject {} and the object {}. State their relation as a short triplet (subject, "
    "relation, object).",
)


def parse_vg_rel(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask for the triplet of subject (region 0) and object (region 1)."""
    regions = fields.regions(count=2, masks=False)
    answer = fields.text("answer")
    question = fill(choose(_QUESTIONS, rng), Mention(0), Mention(1))
    return Parsed(exchange(question, answer), regions)


VG_REL = RecordKind(
    "vg_rel",
    parse_vg_rel,
    texts=("answer",),
    policy="vg_rel",
    prefix="vg_rel",
    fields=("bboxes", "answer"),
    outlines=boxes,
)
VG_REL_GPT4V = replace(
    VG_REL,
    name="vg_rel-gpt4v",
    parse=partial(parse_marked, count=2, masks=False),
    texts=(CONVERSATIONS,),
    policy="vg_rel-gpt4v",
    prefix="vg_rel-gpt4v",
    fields=("bboxes", CONVERSATIONS),
    mentions=(CONVERSATIONS, "bboxes"),
)
