"""LLaVA's own records: a conversation about an image as a whole, or about none.

``{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}``
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kind import CONVERSATIONS, RecordKind


def parse_image_level(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation; nothing is drawn."""
    fields.require_image()
    return Parsed(fields.conversation())


def parse_text_only(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation. ``<image>`` in it is what someone typed."""
    if fields.image is not None:
        fields.refuse(
            "an image lies beside a text-only record; expected none, or a record kind with an image"
        )
    return Parsed(fields.conversation())


def parse_marked(fields: Fields, rng: np.random.Generator, *, count: int, masks: bool) -> Parsed:
    """Return a dialogue of GPT-4V about ``count`` regions, with their mentions."""
    regions = fields.regions(count=count, masks=masks)
    return Parsed(fields.conversation(num_regions=count), regions)


IMAGE_LEVEL = RecordKind(
    "image_level", parse_image_level, texts=(CONVERSATIONS,), mentions=(CONVERSATIONS, None)
)
TEXT_ONLY = replace(IMAGE_LEVEL, name="text_only", parse=parse_text_only, has_image=False)
