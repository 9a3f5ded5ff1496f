"""Marks as the network gets them: large enough, and unlike what they are drawn on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops

from vipllava.ingest.lint.findings import LintLimits, Problem
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import VisualPrompt, VisualPromptPlan
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.shapes import prompt_words


def mark_problems(
    plan: VisualPromptPlan,
    image: Image.Image | None,
    transform: ImageTransform,
    limits: LintLimits,
) -> Iterator[Problem]:
    """Yield the faults of each mark by itself.

    Args:
        plan: the marks.
        image: the unmarked, upright image, RGB; None skips what needs its pixels.
        transform: takes the image to the network's input.
        limits: the thresholds.
    """
    for prompt in plan.prompts:
        name = f"region {prompt.region}, marked `{prompt_words(prompt)}`"
        painted = mark_opacity(prompt, plan.size)
        bounds = None if painted is None else painted[0].getbbox()
        pixels = 0.0
        if painted is not None and bounds is not None:
            left, top = painted[1]
            box = (bounds[0] + left, bounds[1] + top, bounds[2] + left, bounds[3] + top)
            x1, y1, x2, y2 = np.clip(transform.map_box(box, plan.size), 0, transform.size)
            pixels = float(max(x2 - x1, y2 - y1)) if x2 > x1 and y2 > y1 else 0.0
        if pixels < limits.min_mark_pixels:
            yield Problem(
                "mark-small",
                f"{name}: the mark is {pixels:.1f} pixels long in the input of {transform.size} "
                f"(lint.min_mark_pixels={limits.min_mark_pixels:g}); mark a larger region, draw "
                "it bolder, or leave the record out",
            )
        if painted is None or bounds is None or image is None:
            continue
        contrast = mark_contrast(prompt, image, *painted)
        if contrast < limits.min_contrast:
            yield Problem(
                "mark-contrast",
                f"{name}: rgb {prompt.rgb} at opacity {prompt.alpha} changes the image by "
                f"{contrast:g} levels (lint.min_contrast={limits.min_contrast:g}); use another "
                "colour or more opacity",
            )


def mark_contrast(
    prompt: VisualPrompt, image: Image.Image, opacity: Image.Image, corner: tuple[int, int]
) -> float:
    """Return what a mark changes, levels of 0..255; see :class:`LintLimits`.

    Args:
        prompt: the mark.
        image: what it is drawn on, RGB.
        opacity: what it paints, and ``corner``, where: of
            :func:`vipllava.visual_prompts.render.mark_opacity`.
    """
    left, top = corner
    plain = image.crop((left, top, left + opacity.width, top + opacity.height))
    marked = plain.copy()
    marked.paste(prompt.rgb, (0, 0), opacity)
    change = np.asarray(ImageChops.difference(plain, marked)).max(axis=2)
    return float(np.median(change[np.asarray(opacity) > 0]))
