"""A plan onto pixels.

Each mark is one layer: its strokes are painted with the mark's opacity into a single-channel
mask of the mark's own bounds, and the colour is pasted through that mask. Nothing outside the
bounds is touched, which makes drawing cheap on large images.
"""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from vipllava.types import Point, RecordError, Stroke, VisualPrompt, VisualPromptPlan
from vipllava.visual_prompts.shapes import mark_bounds


def render_plan(image: Image.Image, plan: VisualPromptPlan) -> Image.Image:
    """Return a copy of ``image`` with the plan's marks alpha-composited over it.

    Raises:
        RecordError: the image has another size than the plan, or is not RGB.
    """
    if image.size != plan.size or image.mode != "RGB":
        raise RecordError(
            f"the plan is for an RGB picture of {plan.size} pixels, the picture is {image.mode} "
            f"of {image.size}; sample the plan from the picture that is drawn on"
        )
    marked = image.copy()
    for prompt in plan.prompts:
        if (painted := mark_opacity(prompt, image.size)) is not None:
            opacity, (left, top) = painted
            box = (left, top, left + opacity.width, top + opacity.height)
            marked.paste(prompt.rgb, box, opacity)
    return marked


def mark_opacity(
    prompt: VisualPrompt, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]] | None:
    """Return what a mark paints on a picture of ``size`` (width, height).

    Returns:
        The opacity of the mark's bounds, clipped to the picture (mode L: 0, or the mark's alpha
        where it paints), and the place of its top-left corner; None if the mark lies outside.
    """
    x1, y1, x2, y2 = mark_bounds(prompt)
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(size[0], math.ceil(x2) + 1), min(size[1], math.ceil(y2) + 1)
    if left >= right or top >= bottom:
        return None
    opacity = Image.new("L", (right - left, bottom - top), 0)
    canvas = ImageDraw.Draw(opacity)
    for stroke in prompt.strokes:
        points = [(x - left, y - top) for x, y in stroke.points]
        _paint(canvas, stroke, points, prompt.alpha)
    return opacity, (left, top)


def _paint(canvas: ImageDraw.ImageDraw, stroke: Stroke, points: list[Point], alpha: int) -> None:
    filled = stroke.width == 0
    if stroke.kind == "box" and not filled:
        (x1, y1), (x2, y2) = points
        # Pillow paints an outline that is wider than its box beyond the box.
        filled = min(x2 - x1, y2 - y1) < 2 * stroke.width
    if stroke.kind in ("box", "ellipse"):
        paint = canvas.rectangle if stroke.kind == "box" else canvas.ellipse
        if filled:
            paint(points, fill=alpha)
        else:
            paint(points, outline=alpha, width=stroke.width)
    elif stroke.kind == "contour":
        _paint_contour(canvas, points, stroke.width // 2, alpha)
    elif stroke.kind == "polygon" and filled:
        canvas.polygon(points, fill=alpha)
    elif stroke.kind == "polygon":
        canvas.line([*points, points[0]], fill=alpha, width=stroke.width, joint="curve")
    else:
        canvas.line(points, fill=alpha, width=stroke.width)


def _paint_contour(
    canvas: ImageDraw.ImageDraw, points: list[Point], reach: int, alpha: int
) -> None:
    """Paint what a square brush covers that goes round ``points``, ``reach`` pixels to each side.

    The same pixels as one outline per pixel of the brush, without the square of its side in work.
    """
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        if (x1 == x2 or y1 == y2) and x1 % 1 == y1 % 1 == x2 % 1 == y2 % 1 == 0:
            # Of thousands of edges of a mask's pixels: the same pixels in one piece.
            (left, right), (top, bottom) = sorted((x1, x2)), sorted((y1, y2))
            box = (left - reach, top - reach, right + reach, bottom + reach)
            canvas.rectangle(box, fill=alpha)
            continue
        canvas.rectangle((x1 - reach, y1 - reach, x1 + reach, y1 + reach), fill=alpha)
        # Two opposite corners of the brush bound what it sweeps along an edge.
        dy = -reach if (x2 - x1) * (y2 - y1) >= 0 else reach
        ahead = [(x1 + reach, y1 + dy), (x2 + reach, y2 + dy)]
        behind = [(x1 - reach, y1 - dy), (x2 - reach, y2 - dy)]
        canvas.polygon([*ahead, *reversed(behind)], fill=alpha)
        canvas.line(ahead, fill=alpha)
        canvas.line(behind, fill=alpha)
