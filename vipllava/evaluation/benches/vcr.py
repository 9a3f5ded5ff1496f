"""Visual Commonsense Reasoning: the right answer, the right reason for it, and both.

``vcr_qa`` asks for the answer among four, ``vcr_qar`` gives the right answer and asks for the
rationale; each marks the objects that its own texts mention, with points of constant style that are
drawn for each task alone (``visual_prompts=evaluation``), and shows the image at 336 x 336.
``vcr_qar_joint`` asks nothing: an item is right if it is in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from vipllava.evaluation.bench import Bench, BenchData, Item, Published, no_files
from vipllava.evaluation.scoring import SCORERS
from vipllava.records.kind import RecordKind
from vipllava.records.kinds import vcr as kinds
from vipllava.records.wording import LETTERS

_SIZE: Final = (336, 336)
_SOURCE: Final = "ViP-LLaVA, CVPR 2024"


def items(data: BenchData, *, kind: RecordKind) -> Iterator[Item]:
    """Yield an item for each record, read as a task's."""
    for sample in data.samples(kind):
        answer = str(sample.turns[-1].parts[0])
        # The tasks draw their marks independently, so their samples have keys of their own.
        asked = replace(sample, key=f"{sample.key}/{kind.name}", turns=sample.turns[:-1])
        yield Item(f"{sample.dataset}/{sample.key}", asked, answer)


def _no_items(data: BenchData) -> Iterator[Item]:
    return iter(())


def _bench(name: str, kind: RecordKind, figures: tuple[float, float]) -> Bench:
    ours, omni = ({"accuracy": figure} for figure in figures)
    return Bench(
        name,
        partial(items, kind=kind),
        SCORERS["letter"],
        chance=1 / len(LETTERS),
        resize=_SIZE,
        published=(
            Published("ViP-LLaVA-7B base, tuned on VCR", ours, _SOURCE),
            Published("Omni-RGPT-7B", omni, "Omni-RGPT"),
        ),
    )


VCR_QA: Final = _bench("vcr_qa", kinds.VCR_QA, (87.7, 88.5))
VCR_QAR: Final = _bench("vcr_qar", kinds.VCR_QAR, (89.8, 90.1))
VCR_QAR_JOINT: Final = replace(
    _bench("vcr_qar_joint", kinds.VCR, (78.9, 79.9)),
    items=_no_items,
    chance=1 / len(LETTERS) ** 2,
    joins=("vcr_qa", "vcr_qar"),
    files=no_files,
)
