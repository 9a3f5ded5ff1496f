"""The published policies as values, for those who have no ``conf/``; a test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from vipllava.visual_prompts.policies import VisualPromptPolicy as Policy

_PUBLISHED: Final = {
    "refcocog": Policy(),
    "vg_rel": Policy(shapes=("rectangle", "ellipse")),
    "vg_rel-gpt4v": Policy(shapes=("rectangle", "ellipse"), article_rate=0.5),
    "flickr30k": Policy(shapes=("rectangle", "ellipse", "arrow"), distinguishable=True),
    "vcr": Policy(
        shapes=("rectangle", "ellipse", "triangle", "mask", "mask contour", "arrow", "scribble"),
        article_rate=0.5,
        distinguishable=True,
    ),
    "v7w": Policy(
        shapes=("rectangle",), article_rate=0.5, constant_style=True, distinguishable=True
    ),
    "pointQA_twice": Policy(
        shapes=("rectangle",), colour="red", name_colour=False, constant_style=True
    ),
    "regions": Policy(distinguishable=True),  # users' own records
}

# VCR is asked with points, which training leaves out, all of one size.
_ASKED: Final = _PUBLISHED | {
    "vcr": replace(_PUBLISHED["vcr"], shapes=("point",), constant_style=True)
}

POLICIES: Final[Mapping[str, Mapping[str, Policy]]] = MappingProxyType(
    {
        "published": MappingProxyType(_PUBLISHED),
        "evaluation": MappingProxyType(
            {name: replace(policy, fixed_alpha=128) for name, policy in _ASKED.items()}
        ),
    }
)
"""``published`` for training, ``evaluation`` for the benchmarks; in each by the policy's name."""
