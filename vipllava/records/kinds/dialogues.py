"""LLaVA's own records: a conversation about an image as a whole, or about none.

``{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}``
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vipllava.records.field_names import meant_for
from vipllava.records.fields import IMAGE_PLACEHOLDER, Fields, Parsed
from vipllava.records.kind import CONVERSATIONS, RecordKind


def parse_image_level(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation; nothing is drawn, so no ``<bboxN>`` can be meant."""
    fields.require_image()
    return Parsed(fields.conversation(num_regions=0))


def parse_text_only(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the conversation. ``<image>`` within a text is what someone typed.

    Not so where it stands in a question as it does in front of or behind one about an image, or
    where another field seems to name an image: that image is refused to be missed.
    """
    if fields.image is not None:
        fields.refuse(
            "an image lies beside a text-only record; expected none, or a record kind with an image"
        )
    turns = fields.conversation()
    asked = [part.strip() for turn in turns[::2] for part in turn.parts if isinstance(part, str)]
    asked = [text for text in asked if IMAGE_PLACEHOLDER in text]
    meant = meant_for(fields.record, "image")
    if any(meant or text.startswith(IMAGE_PLACEHOLDER) or text.endswith(IMAGE_PLACEHOLDER)
           for text in asked):  # fmt: skip
        fields.refuse(
            f"a question has {IMAGE_PLACEHOLDER} and the record no field `image`"
            f"{meant or '; name its file there, or remove the placeholder'}",
            "image-missing",
        )
    return Parsed(turns)


def parse_marked(fields: Fields, rng: np.random.Generator, *, count: int, masks: bool) -> Parsed:
    """Return a dialogue of GPT-4V about ``count`` regions, with their mentions."""
    regions = fields.regions(count=count, masks=masks)
    return Parsed(fields.conversation(num_regions=count), regions)


IMAGE_LEVEL = RecordKind(
    "image_level",
    parse_image_level,
    texts=(CONVERSATIONS,),
    fields=(CONVERSATIONS,),
    mentions=(CONVERSATIONS, None),
)
TEXT_ONLY = replace(IMAGE_LEVEL, name="text_only", parse=parse_text_only, has_image=False)
