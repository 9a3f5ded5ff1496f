"""Texts against regions and marks: every placeholder has its region, and words tell apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from vipllava.ingest.lint.geometry import caption_phrases
from vipllava.types import Mention, Sample, Turn, VisualPromptPlan
from vipllava.visual_prompts.palette import PALETTE
from vipllava.visual_prompts.shapes import shape_words

Fault = tuple[str, str]
"""Code and message."""

DIALOGUES: Final = frozenset(("regions", "refcocog-gpt4v", "vg_rel-gpt4v"))
"""Kinds whose texts come with the record and mention its regions by placeholders."""
_WITHOUT_REGIONS: Final = frozenset(("image_level", "text_only"))
_PLACEHOLDER: Final = re.compile(r"<bbox(\d{0,9})>")
_COLOUR_NAMES: Final = {rgb: name for name, rgb in PALETTE.items()}


def placeholder_faults(record: Mapping[str, Any], kind: str) -> Iterator[Fault]:
    """Yield placeholders without a region, and regions without a placeholder.

    Of records whose texts are made by their kind, :func:`leftover_faults` tells.
    """
    if kind == "flickr30k":
        yield from _caption_faults(record)
    if kind not in DIALOGUES | _WITHOUT_REGIONS:
        return
    boxes: Any = record.get("bboxes") if kind in DIALOGUES else []
    if not isinstance(boxes, list) or (kind in DIALOGUES and not boxes):
        return  # the parser's to refuse
    count = len(cast("list[Any]", boxes))
    mentioned: set[int] = set()
    turns, whole = _dialogue(record)
    for number, value in turns:
        for match in _PLACEHOLDER.finditer(value):
            region = 0 if count == 1 and not match.group(1) else _number(match.group(1))
            if region is not None and region < count:
                mentioned.add(region)
                continue
            whole = False  # a wrong number explains why another region is never mentioned
            known = {0: "no regions", 1: "one region, <bbox0>"}.get(
                count, f"{count} regions, <bbox0> to <bbox{count - 1}>"
            )
            yield (
                "placeholder-without-region",
                f"conversations[{number}] has {match.group()}; this record has {known}: correct "
                "the number, or add the box to `bboxes`",
            )
    if whole and (silent := sorted(set(range(count)) - mentioned)):
        named = ", ".join(f"<bbox{region}>" for region in silent)
        yield (
            "region-unmentioned",
            f"no text that is learnt mentions {named}; the mark is drawn all the same: mention "
            "it, or remove the box",
        )


def _number(digits: str) -> int | None:
    return int(digits) if digits else None


def _dialogue(record: Mapping[str, Any]) -> tuple[list[tuple[int, str]], bool]:
    """Return number and text of the turns that are kept, and whether all could be read.

    As in the parser: answers before the first question and a last question without an answer
    are left out.
    """
    items = record.get("conversations")
    given = cast("list[Any]", items) if isinstance(items, list) else []
    turns: list[tuple[int, Any, str]] = []
    for number, item in enumerate(given):
        if isinstance(item, Mapping):
            turn = cast("Mapping[str, Any]", item)
            if isinstance(value := turn.get("value"), str):
                turns.append((number, turn.get("from"), value))
    whole = 0 < len(given) == len(turns)
    while turns and turns[0][1] == "gpt":
        turns.pop(0)
    if turns and turns[-1][1] == "human":
        turns.pop()
    return [(number, value) for number, _, value in turns], whole


def _caption_faults(record: Mapping[str, Any]) -> Iterator[Fault]:
    phrases = record.get("bbox")
    if not isinstance(phrases, list):
        return
    count = len(cast("list[Any]", phrases))
    for phrase in caption_phrases(record):
        if phrase >= count:
            yield (
                "placeholder-without-region",
                f"field `grounding` has <bbox{phrase}>; `bbox` has {count} phrases: correct the "
                "number, or add the phrase's boxes",
            )


def leftover_faults(sample: Sample) -> Iterator[Fault]:
    """Yield placeholders that the record's kind did not read: they would be learnt as text."""
    for number, turn in enumerate(sample.turns):
        for part in turn.parts:
            for match in _PLACEHOLDER.finditer(part) if isinstance(part, str) else ():
                yield (
                    "placeholder-without-region",
                    f"turn {number + 1} ({turn.role}) keeps {match.group()} as text: this kind of "
                    "record has no placeholder there; remove it",
                )


def same_words_faults(sample: Sample, plan: VisualPromptPlan) -> Iterator[Fault]:
    """Yield groups of marks that nobody can tell apart by their words.

    The article makes no difference, and marks that share a style on purpose count once.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for prompt in plan.prompts:
        if sample.regions[prompt.region].style_of is None:
            groups[shape_words(prompt.shape, prompt.colour_name)].append(prompt.region)
    for words, regions in groups.items():
        if len(regions) > 1:
            yield (
                "same-words",
                f"regions {', '.join(map(str, regions))} are all marked `{words}`; give them "
                "different shapes or palette colours, or use fewer regions",
            )


def colour_faults(sample: Sample, plan: VisualPromptPlan, turns: Sequence[Turn]) -> Iterator[Fault]:
    """Yield answers whose own words name a mark's colour before any question does.

    Args:
        sample: its answers are searched without their mentions.
        plan: the marks; an unnamed colour of the palette counts, too.
        turns: the finished turns, whose questions are searched with their mentions.
    """
    colours = [prompt.colour_name or _COLOUR_NAMES.get(prompt.rgb) for prompt in plan.prompts]
    asked = ""
    named: set[str] = set()
    for number, (draft, turn) in enumerate(zip(sample.turns, turns, strict=True)):
        if turn.role == "user":
            asked += f"\n{turn.text}"
            continue
        # What stands on the two sides of a mention is not one word.
        answer = "\n".join("" if isinstance(part, Mention) else part for part in draft.parts)
        for colour in dict.fromkeys(name for name in colours if name):
            if colour not in named and _says(answer, colour) and not _says(asked, colour):
                named.add(colour)
                yield (
                    "answer-names-colour",
                    f"turn {number + 1} (assistant) says `{colour}`, the colour of a mark that no "
                    "question named so far; if it means the mark, write its placeholder",
                )


def _says(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def blank_answers(turns: Sequence[Turn]) -> list[int]:
    """Return the numbers, from 1, of the answers without a visible character."""
    return [
        number
        for number, turn in enumerate(turns, 1)
        if turn.role == "assistant" and not turn.text.strip()
    ]
