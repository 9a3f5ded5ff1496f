"""PointQA-LookTwice: a question about all objects like the marked one; a word or a count.

Published with one red rectangle that the words do not colour, opacity 128
(``visual_prompts=evaluation``); the whole output has to be the answer, case aside.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from vipllava.evaluation.bench import Bench, Published
from vipllava.evaluation.marking import items_of
from vipllava.evaluation.scoring import SCORERS

_SOURCE: Final = "ViP-LLaVA, CVPR 2024"
POINTQA: Final = Bench(
    "pointqa",
    partial(items_of, record_kind="pointQA_twice"),
    SCORERS["exact"],
    published=(
        Published("ViP-LLaVA-7B", {"accuracy": 71.31}, _SOURCE),
        Published("ViP-LLaVA-13B", {"accuracy": 71.77}, _SOURCE),
        Published("ViP-LLaVA-Llama-3-8B", {"accuracy": 70.2}, "its model page"),
        Published("ViP-LLaVA-Phi-3-mini", {"accuracy": 69.6}, "its model page"),
    ),
)
