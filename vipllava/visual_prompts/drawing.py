"""Marks on one image of one's own: the pixels and the words of the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from vipllava.keyed_random import generator_for
from vipllava.types import BBox, FixedVisualPrompt, RecordError, Region, VipLlavaError
from vipllava.visual_prompts.policies import POLICIES, VisualPromptPolicy, get_policy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import prompt_words


class Drawn(NamedTuple):
    """An image with marks, and by which words a text names them, e.g. ``within the red arrow``."""

    image: Image.Image  # RGB, of the size of the given one
    words: tuple[str, ...]  # one text per region


def draw(
    image: Image.Image,
    regions: Sequence[Region | BBox],
    *,
    policy: VisualPromptPolicy | str = "regions",
    seed: int = 0,
    fixed: Sequence[FixedVisualPrompt] = (),
) -> Drawn:
    """Draw one mark per region.

    Args:
        image: left unchanged.
        regions: boxes ``(x1, y1, x2, y2)`` in pixels of the image, or regions, which may have
            masks.
        policy: which marks; a name is one of ``POLICIES["published"]``.
        seed: of shapes, colours and strokes.
        fixed: what is not to be sampled, one per region; empty samples everything.

    Raises:
        RecordError: a region is empty or not in the image, or two cannot be told apart by words.
        VipLlavaError: there is no such policy, or ``image`` is none.
    """
    given: Any = image
    if not isinstance(given, Image.Image):
        raise VipLlavaError(
            f"image is {image!r}: open a file by PIL.ImageOps.exif_transpose(PIL.Image.open(path))"
        )
    rgb = image.convert("RGB")
    if isinstance(policy, str):
        policy = get_policy(POLICIES["published"], policy)
    marked = [each if isinstance(each, Region) else Region(each) for each in regions]
    for number, (x1, y1, x2, y2) in enumerate(region.bbox_xyxy for region in marked):
        if max(x1, 0) >= min(x2, rgb.width) or max(y1, 0) >= min(y2, rgb.height):
            raise RecordError(
                f"region {number} is ({x1}, {y1}, {x2}, {y2}); expected (x1, y1, x2, y2) with a "
                f"part inside the image of {rgb.width} x {rgb.height} pixels"
            )
    plan = sample_plan(marked, rgb.size, policy, generator_for(seed, "draw"), fixed)
    return Drawn(render_plan(rgb, plan), tuple(map(prompt_words, plan.prompts)))
