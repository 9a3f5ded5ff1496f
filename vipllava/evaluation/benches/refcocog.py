"""RefCOCOg region captioning: a short phrase for the marked object, by CIDEr-D and METEOR.

Nothing was released for it, so that its terms are stated here: the val split (umd), each region
asked once in the same words, all that people have said of it as its references.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from vipllava.evaluation.bench import Published
from vipllava.evaluation.benches.custom import CUSTOM, CustomOptions
from vipllava.evaluation.marking import items_of
from vipllava.records.kinds.refcocog import REFCOCOG_CAPTION


@dataclass(frozen=True)
class CaptionOptions(CustomOptions):
    """Settings of this benchmark."""

    score: str = "captions"


REFCOCOG: Final = replace(
    CUSTOM,
    name="refcocog",
    items=partial(items_of, record_kind=REFCOCOG_CAPTION),
    options=CaptionOptions,
    metric="CIDEr",
    chance=0.0,  # about: of a phrase for another object
    published=(
        Published(
            "ViP-LLaVA-7B base, tuned on RefCOCOg",
            {"METEOR": 16.6, "CIDEr": 105.9},
            "ViP-LLaVA, CVPR 2024",
        ),
        Published("Omni-RGPT-7B", {"METEOR": 17.0, "CIDEr": 109.7}, "Omni-RGPT"),
        Published("RegionGPT-7B", {"METEOR": 16.9, "CIDEr": 109.9}, "RegionGPT"),
    ),
)
