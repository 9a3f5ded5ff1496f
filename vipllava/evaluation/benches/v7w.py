"""Visual7W pointing: which of four marked regions answers the question, by its letter.

Published with rectangles of constant width and opacity 128 (``visual_prompts=evaluation``); the
whole output has to be the letter. The marks move by changing places: then another letter is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Final

from vipllava.evaluation.bench import Bench, BenchData, Item, Moved, Published
from vipllava.evaluation.scoring import SCORERS
from vipllava.records.wording import LETTERS
from vipllava.types import Sample


def items(data: BenchData) -> Iterator[Item]:
    """Yield an item for each record."""
    for sample in data.samples("v7w"):
        answer = str(sample.turns[-1].parts[0])
        asked = replace(sample, turns=sample.turns[:-1])
        places = tuple(_places(sample, answer)) if "moved" in data.marks else ()
        yield Item(f"{sample.dataset}/{sample.key}", asked, answer, moved=places)


def _places(sample: Sample, answer: str) -> Iterator[Moved]:
    """Yield the ways in which no mark stays at its place."""
    wanted = sample.regions[LETTERS.index(answer)].bbox_xyxy
    for order in permutations(range(len(sample.regions))):
        if all(new != old for old, new in enumerate(order)):
            regions = tuple(sample.regions[at] for at in order)
            boxes = [region.bbox_xyxy for region in regions]
            yield Moved(regions, LETTERS[boxes.index(wanted)])  # of equal boxes the first counts


_SOURCE: Final = "ViP-LLaVA, CVPR 2024"
V7W: Final = Bench(
    "v7w",
    items,
    SCORERS["letter"],
    chance=1 / len(LETTERS),
    published=(
        Published("ViP-LLaVA-7B", {"accuracy": 86.09}, _SOURCE),
        Published("ViP-LLaVA-13B", {"accuracy": 88.28}, _SOURCE),
        Published("ViP-LLaVA-Llama-3-8B", {"accuracy": 84.3}, "its model page"),
        Published("ViP-LLaVA-Phi-3-mini", {"accuracy": 85.3}, "its model page"),
        Published("GPT4RoI-7B", {"accuracy": 84.8}, "quoted by ViP-LLaVA"),
    ),
)
