"""Text-only records: a conversation and no picture. ``<image>`` in them is what someone typed."""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.types import RecordError


def parse_text_only(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation."""
    if fields.image is not None:
        raise RecordError(
            f"{fields.dataset}/{fields.key}: a picture lies beside a text-only record; expected "
            "none, or a record kind with a picture"
        )
    return Parsed(fields.conversation())
