"""GPT-4V dialogues about a Visual Genome relation.

As ``vg_rel`` without ``answer``, and ``conversations`` with ``<bbox0>`` and ``<bbox1>``.
"""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind, boxes


def parse_vg_rel_gpt4v(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the dialogue with mentions."""
    regions = fields.regions(count=2, masks=False)
    return Parsed(fields.conversation(num_regions=2), tuple(regions))


VG_REL_GPT4V = RecordKind(
    "vg_rel-gpt4v",
    parse_vg_rel_gpt4v,
    texts=("conversations",),
    policy="vg_rel-gpt4v",
    prefix="vg_rel-gpt4v",
    outlines=boxes,
    mentions=("conversations", "bboxes"),
)
