"""A sample's way on one core: our path against the plain one, per picture size and per shape.

The plain path decodes with Pillow, draws on a full-size RGBA layer and composites it, pads,
resizes bicubically with Pillow and normalises to floats. Both read the same JPEG and draw the
same plan; the two are timed in turn, and medians are reported.
"""

from __future__ import annotations

import importlib.resources
import io
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vipllava.data.image_transform import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTransform,
    decode_image,
    reference_transform,
)
from vipllava.keyed_random import generator_for
from vipllava.types import Region, VisualPromptPlan
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import SHAPES

_SIZES = ((640, 480), (500, 333), (427, 640), (1024, 768))
_INPUT = 336
_REPEATS = 15


def run() -> dict[str, Any]:
    """Measure; ``speedup`` is plain over ours per picture size, median over shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_measure(size, shape) for size in _SIZES for shape in SHAPES]
    finally:
        torch.set_num_threads(threads)
    speedup = {
        f"{w}x{h}": median(r["speedup"] for r in rows if r["size"] == f"{w}x{h}") for w, h in _SIZES
    }
    return {"rows": rows, "speedup": speedup}


def _measure(size: tuple[int, int], shape: Any) -> dict[str, Any]:
    photograph = importlib.resources.files("skimage.data").joinpath("astronaut.png").read_bytes()
    image = Image.open(io.BytesIO(photograph)).convert("RGB").resize(size)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    jpeg = buffer.getvalue()
    w, h = size
    ring = ((0.3, 0.3), (0.5, 0.25), (0.75, 0.45), (0.6, 0.75), (0.35, 0.7))
    polygon = tuple((x * w, y * h) for x, y in ring)
    region = Region((0.3 * w, 0.25 * h, 0.75 * w, 0.75 * h), (polygon,))
    policy = VisualPromptPolicy(shapes=(shape,))
    plan = sample_plan([region], size, policy, generator_for("bench", shape))
    transform = ImageTransform(_INPUT, "pad")
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (CLIP_MEAN, CLIP_STD))

    def ours() -> torch.Tensor:
        return transform(render_plan(decode_image(jpeg, "bench"), plan))

    def plain() -> torch.Tensor:
        decoded = Image.open(io.BytesIO(jpeg)).convert("RGB")
        padded = reference_transform(_draw_plainly(decoded, plan), _INPUT, "pad")
        return (padded.float() - mean) / std

    times = _interleaved(ours, plain)
    sampling = _interleaved(lambda: sample_plan([region], size, policy, generator_for("b")))[0]
    rendering = _interleaved(lambda: render_plan(image, plan))[0]
    return {
        "size": f"{w}x{h}",
        "shape": shape,
        "ours_ms": times[0],
        "plain_ms": times[1],
        "speedup": times[1] / times[0],
        "plan_ms": sampling,
        "draw_ms": rendering,
    }


def _draw_plainly(image: Image.Image, plan: VisualPromptPlan) -> Image.Image:
    layer = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(layer)
    for prompt in plan.prompts:
        fill = (*prompt.rgb, prompt.alpha)
        for stroke in prompt.strokes:
            points = list(stroke.points)
            if stroke.kind == "box":
                pen.rectangle(points, outline=fill, width=stroke.width)
            elif stroke.kind == "ellipse":
                outline = {"fill": fill} if stroke.width == 0 else {"outline": fill}
                pen.ellipse(points, width=max(1, stroke.width), **outline)
            elif stroke.width == 0:
                pen.polygon(points, fill=fill)
            else:
                closing = points[:2] if stroke.kind == "polygon" else []
                pen.line(points + closing, fill=fill, width=stroke.width, joint="curve")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def _interleaved(*functions: Callable[[], object]) -> list[float]:
    """Time each function in turn, several times; medians in milliseconds."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(_REPEATS):
        for function, collected in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            collected.append(1000 * (time.perf_counter() - began))
    return [float(np.median(collected[2:])) for collected in times]
