"""The nine colours a mark may be named by (source: ViP-LLaVA, CVPR 2024)."""

from __future__ import annotations

from typing import Final

import numpy as np

from vipllava.types import RGB, VipLlavaError

PALETTE: Final[dict[str, RGB]] = {
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "fuchsia": (255, 0, 255),
    "aqua": (0, 255, 255),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "gold": (255, 215, 0),
}


def named_colour(name: str) -> RGB:
    """Return the RGB value of a palette colour; an unknown name lists the known ones."""
    if name not in PALETTE:
        raise VipLlavaError(f"unknown colour `{name}`; the palette has: {', '.join(PALETTE)}")
    return PALETTE[name]


def sample_unnamed_colour(rng: np.random.Generator) -> RGB:
    """Draw a uniform random RGB value, for marks whose colour the text does not name."""
    red, green, blue = rng.integers(0, 256, size=3)
    return int(red), int(green), int(blue)
