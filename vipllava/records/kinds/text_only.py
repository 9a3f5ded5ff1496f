"""Text-only records: a conversation and no image. ``<image>`` in them is what someone typed."""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind
from vipllava.types import RecordError


def parse_text_only(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation."""
    if fields.image is not None:
        raise RecordError(
            f"{fields.dataset}/{fields.key}: an image lies beside a text-only record; expected "
            "none, or a record kind with an image"
        )
    return Parsed(fields.conversation())


TEXT_ONLY = RecordKind(
    "text_only",
    parse_text_only,
    texts=("conversations",),
    mentions=("conversations", None),
    has_image=False,
)
