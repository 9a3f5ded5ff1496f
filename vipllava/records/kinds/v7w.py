"""Visual7W pointing: a question whose four answers are marked regions.

``{"bboxes": [4], "question", "answer"}``; the answer is one of the boxes, the first of equal ones.
A box may be without area: the published items have such.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind, boxes
from vipllava.records.wording import LETTERS, OPTION_LETTER, exchange, join
from vipllava.types import Mention


def parse_v7w(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Letter the four marks in the record's order, the way LLaVA-1.5 does."""
    question = fields.text("question")
    regions = fields.regions(count=len(LETTERS), masks=False, may_be_empty=True)
    given: list[Any] = fields.record["bboxes"]
    answer: Any = fields.require("answer", "one of the four boxes")
    if answer not in given:
        fields.fail("answer", answer, f"one of the boxes {given}")
    text: list[str | Mention] = [question, "\n"]
    for number, letter in enumerate(LETTERS):
        text += [f"{letter}. The object ", Mention(number), "\n"]
    return Parsed(exchange(join([*text, OPTION_LETTER]), LETTERS[given.index(answer)]), regions)


V7W = RecordKind(
    "v7w",
    parse_v7w,
    texts=("question",),
    policy="v7w",
    prefix="v7w",
    fields=("bboxes", "question", "answer"),
    outlines=partial(boxes, may_be_empty=True),
)
