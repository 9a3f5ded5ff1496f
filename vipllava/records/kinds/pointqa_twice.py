"""PointQA-LookTwice: a question about all objects like the marked one.

``{"bboxes": [1], "general_question", "answer"}``; the record's other questions name the object
and need no mark. The wording is the benchmark's own, in training too.
"""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind, boxes
from vipllava.records.wording import SHORT_ANSWER, exchange, fill
from vipllava.types import Mention


def parse_pointqa_twice(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask the general question about the exemplar (region 0)."""
    question = fields.text("general_question")
    regions = fields.regions(count=1, masks=False)
    text = fill(f"{{}} The exemplary object is {{}}.\n{SHORT_ANSWER}", question, Mention(0))
    return Parsed(exchange(text, fields.answer()), regions)


POINTQA_TWICE = RecordKind(
    "pointQA_twice",
    parse_pointqa_twice,
    texts=("general_question", "answer"),
    policy="pointQA_twice",
    prefix="pointQA_twice",
    fields=("bboxes", "general_question", "answer"),
    outlines=boxes,
)
