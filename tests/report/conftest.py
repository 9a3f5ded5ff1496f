"""Samples traced by the real stages, for the pages that show them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

# The encoders of all templates, and the tokenizers that they are made of.
from tests.conversation.conftest import (  # noqa: F401
    conversations,
    encoders,
    llama3_like,
    llama_like,
    phi3_legacy_like,
    phi3_like,
    smol_like,
)
from vipllava.conversation.encode import ConversationEncoder, TooLong
from vipllava.models.towers import CLIP
from vipllava.report.inspected import InspectedSample, inspect_trace
from vipllava.stream.image_transform import ImageAspect, ImageTransform
from vipllava.stream.sample_encoder import SampleEncoder
from vipllava.types import (
    BBox,
    DraftTurn,
    FixedVisualPrompt,
    Mention,
    Polygon,
    Region,
    Sample,
    Shape,
)
from vipllava.visual_prompts.policies import VisualPromptPolicy

Inspect = Callable[..., InspectedSample]

SIDE = 56


def png(width: int, height: int) -> bytes:
    """Return a picture of soft stripes."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows, columns + rows], axis=-1) * 255 // (width + height)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(
    *texts: str | tuple[str | Mention, ...],
    size: tuple[int, int] | None = (100, 80),
    boxes: Sequence[BBox] = (),
    polygons: Sequence[Polygon] = (),
    shape: Shape = "rectangle",
) -> Sample:
    """Return a sample; its marks are red, 4 pixels wide and three fifths opaque.

    Args:
        texts: question and answer in turn; the picture stands before the first.
        size: of the picture; None for a sample without one.
        boxes: one mark each.
        polygons: the mask of every region.
        shape: of every mark.
    """
    turns = tuple(
        DraftTurn(
            "assistant" if index % 2 else "user",
            (text,) if isinstance(text, str) else text,
            has_image=index == 0 and size is not None,
        )
        for index, text in enumerate(texts)
    )
    return Sample(
        key="set/7",
        dataset="toys",
        image=None if size is None else png(*size),
        regions=tuple(Region(box, tuple(polygons)) for box in boxes),
        turns=turns,
        policy="plain_marks" if boxes else "none",
        fixed=tuple(FixedVisualPrompt(shape, "red", 4, 153) for _ in boxes),
    )


@pytest.fixture(scope="session")
def inspect(encoders: dict[str, ConversationEncoder]) -> Inspect:  # noqa: F811
    """Trace a sample as training does and turn it into what is shown."""

    def inspect(
        sample: Sample,
        template: str = "llava_v1",
        *,
        aspect: ImageAspect = "pad",
        max_length: int = 2048,
        too_long: TooLong = "drop_turns",
    ) -> InspectedSample:
        base = encoders[template]
        encoder = ConversationEncoder(
            base.tokenizer,
            base.template,
            base.image_token_id,
            base.image_seq_length,
            max_length,
            too_long,
        )
        transform = ImageTransform(SIDE, aspect, CLIP.preprocessing)
        policies = {"plain_marks": VisualPromptPolicy()}
        trace = SampleEncoder(policies, encoder, transform, seed=0).trace(sample)
        shown = inspect_trace(trace, encoder, transform, shard="a.tar", record_kind="regions")
        assert shown.fault == ""
        return shown

    return inspect
