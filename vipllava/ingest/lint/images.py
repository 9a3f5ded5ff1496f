"""The image beside a record, and the marks on it as the network gets them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops

from vipllava.ingest.image_format import format_of, same_format
from vipllava.ingest.lint.findings import LintLimits, Problem
from vipllava.records import RecordKind
from vipllava.records.fields import Fields
from vipllava.records.image_decode import decode_image
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import RecordError, VisualPrompt, VisualPromptPlan
from vipllava.visual_prompts.render import mark_opacity
from vipllava.visual_prompts.shapes import prompt_words


def read_image(fields: Fields, kind: RecordKind) -> tuple[Image.Image | None, RecordError | None]:
    """Decode the whole image; return it, or what is wrong with it (None twice: text only)."""
    try:
        if kind.has_image:
            fields.require_image()
        if fields.image is None:
            return None, None
        return decode_image(fields.image, f"{fields.dataset}/{fields.key}"), None
    except RecordError as error:
        return None, error


def extension_problems(data: bytes, extension: str | None) -> Iterator[Problem]:
    """Yield a problem if an image's extension is not the one of its bytes."""
    found = format_of(data)
    if extension is not None and found is not None and not same_format(extension, found):
        yield Problem(
            "image-extension",
            f"the image is called .{extension} and is a .{found}; it is read as what it is, other "
            f"programs may not: rename it, or store it as .{extension}",
        )


def mark_problems(
    plan: VisualPromptPlan,
    image: Image.Image | None,
    transform: ImageTransform,
    limits: LintLimits,
) -> Iterator[Problem]:
    """Yield marks that are too small, or too like what they are drawn on.

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
                f"(min_mark_pixels={limits.min_mark_pixels:g}); mark a larger region, draw it "
                "bolder, or leave the record out",
            )
        if painted is None or bounds is None or image is None:
            continue
        contrast = _contrast(prompt, image, *painted)
        if contrast < limits.min_contrast:
            yield Problem(
                "mark-contrast",
                f"{name}: rgb {prompt.rgb} at opacity {prompt.alpha} changes the image by "
                f"{contrast:g} levels (min_contrast={limits.min_contrast:g}); use another colour "
                "or more opacity",
            )


def _contrast(
    prompt: VisualPrompt, image: Image.Image, opacity: Image.Image, corner: tuple[int, int]
) -> float:
    """Return what a mark that paints ``opacity`` changes; see :class:`LintLimits`."""
    left, top = corner
    plain = image.crop((left, top, left + opacity.width, top + opacity.height))
    marked = plain.copy()
    marked.paste(prompt.rgb, (0, 0), opacity)
    change = np.asarray(ImageChops.difference(plain, marked)).max(axis=2)
    return float(np.median(change[np.asarray(opacity) > 0]))
