"""Image-level LLaVA records: an image and a conversation about the whole of it.

``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``
"""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import RecordKind


def parse_image_level(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation; nothing is drawn."""
    fields.require_image()
    return Parsed(fields.conversation())


IMAGE_LEVEL = RecordKind(
    "image_level", parse_image_level, texts=("conversations",), mentions=("conversations", None)
)
