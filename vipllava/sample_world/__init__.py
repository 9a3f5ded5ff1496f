"""The embedded sample world: scenes, records, shards, a sample ViP-Bench and base weights.

Real photographs and real handwritten digits (carried by scikit-image and scikit-learn) and drawn
objects make scenes whose boxes and masks are exact, small enough that a tiny model learns to read
visual prompts on a CPU in minutes. Here is what that model starts from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from vipllava.visual_prompts.policies import POLICIES, ShapeRanges

BASE: Final = Path(__file__).parent / "base"
"""Holds ``vision_tower`` and ``language_model``; ``tools/teach_base`` makes them."""

# Lines that survive the resize to 112 pixels and leave the object visible.
_RANGES: Final = ShapeRanges(
    anchor=168, rectangle_width=(3, 5), ellipse_width=(3, 5), triangle_width=(3, 4),
    scribble_width=(3, 5), arrow_width=(3, 4), contour_width=(1, 2), point_radius=(6, 9),
    ellipse_scale=(1.0, 1.3), arrow_head_min=9.0, alpha=(176, 255), mask_alpha=(96, 128),
)  # fmt: skip
TINY_POLICIES: Final = {
    name: replace(policy, ranges=_RANGES) for name, policy in POLICIES["published"].items()
}
"""``conf/visual_prompts/tiny.yaml`` as values."""
