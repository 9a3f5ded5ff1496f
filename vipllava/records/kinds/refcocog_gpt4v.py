"""GPT-4V dialogues about one RefCOCOg object.

As ``refcocog`` without ``answer``, and ``conversations`` in which ``<bbox>`` stands for the mark.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind, boxes_and_masks


def parse_refcocog_gpt4v(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the dialogue with mentions."""
    regions = fields.regions(count=1, masks=True)
    return Parsed(fields.conversation(num_regions=1), tuple(regions))


REFCOCOG_GPT4V = RecordKind(
    "refcocog-gpt4v",
    parse_refcocog_gpt4v,
    texts=("conversations",),
    policy="refcocog",
    prefix="refcocog-gpt4v",
    outlines=partial(boxes_and_masks, all_masks=True),
    mentions=("conversations", "bboxes"),
)
