"""Texts against regions and marks: every placeholder has its region, and words tell apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from vipllava.ingest.lint.findings import Problem
from vipllava.records import RecordKind
from vipllava.records.fields import REGION_PLACEHOLDER, kept_turns
from vipllava.records.kind import list_or_empty
from vipllava.types import Mention, Sample, Turn, VisualPromptPlan
from vipllava.visual_prompts.shapes import PALETTE, shape_words

_COLOUR_NAMES: Final = {rgb: name for name, rgb in PALETTE.items()}


def placeholder_problems(record: Mapping[str, Any], kind: RecordKind) -> Iterator[Problem]:
    """Yield placeholders without a region, and regions that a dialogue never mentions.

    What a kind leaves as text where it reads no placeholders, :func:`leftover_problems` tells.
    """
    field, listed = kind.mentions or (None, None)
    count = len(list_or_empty(record.get(listed))) if listed else 0
    if field is None or (listed and not count):
        return  # no regions in the list are the parser's to refuse
    texts, complete = _texts(record, field)
    unmentioned = set(range(count))
    for where, text in texts:
        for match in REGION_PLACEHOLDER.finditer(text):
            bare = not match.group(1)
            region = int(match.group(1) or 0)
            if region < count and (count == 1 or not bare):
                unmentioned.discard(region)
                continue
            complete = False  # a wrong number explains why another region is never mentioned
            known = "one region, <bbox0>" if count == 1 else f"{count} regions"
            known += f", <bbox0> to <bbox{count - 1}>" if count > 1 else ""
            remedy = f"correct the number, or add the box to `{listed}`" if listed else "remove it"
            yield Problem(
                "placeholder-without-region",
                f"{where} has {match.group()}; this record has {known}: {remedy}",
            )
    if complete and unmentioned:
        named = ", ".join(f"<bbox{region}>" for region in sorted(unmentioned))
        yield Problem(
            "region-unmentioned",
            f"no text that is learnt mentions {named}; the mark is drawn all the same: mention "
            "it, or remove the box",
        )


def _texts(record: Mapping[str, Any], field: str) -> tuple[list[tuple[str, str]], bool]:
    """Return place and text of what is kept, and whether it is a dialogue that could be read."""
    value = record.get(field)
    if isinstance(value, str):
        return [(f"field `{field}`", value)], False
    given = list_or_empty(value)
    turns: list[tuple[str, Any, str]] = []
    for number, item in enumerate(given):
        if isinstance(item, Mapping):
            turn = cast("Mapping[str, Any]", item)
            if isinstance(text := turn.get("value"), str):
                turns.append((f"{field}[{number}]", turn.get("from"), text))
    complete = 0 < len(given) == len(turns)
    return [(where, text) for where, _, text in kept_turns(turns)], complete


def leftover_problems(sample: Sample) -> Iterator[Problem]:
    """Yield placeholders that the record's kind did not read: they would be learnt as text."""
    for number, turn in enumerate(sample.turns):
        for part in turn.parts:
            for match in REGION_PLACEHOLDER.finditer(part) if isinstance(part, str) else ():
                yield Problem(
                    "placeholder-without-region",
                    f"turn {number + 1} ({turn.role}) keeps {match.group()} as text: this kind of "
                    "record has no placeholder there; remove it",
                )


def same_words_problems(sample: Sample, plan: VisualPromptPlan) -> Iterator[Problem]:
    """Yield groups of marks that nobody can tell apart by their words.

    The article makes no difference, and marks that share a style on purpose count once.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for prompt in plan.prompts:
        if sample.regions[prompt.region].style_of is None:
            groups[shape_words(prompt.shape, prompt.colour_name)].append(prompt.region)
    for words, regions in groups.items():
        if len(regions) > 1:
            yield Problem(
                "same-words",
                f"regions {', '.join(map(str, regions))} are all marked `{words}`; give them "
                "different shapes or palette colours, or use fewer regions",
            )


def colour_problems(
    sample: Sample, plan: VisualPromptPlan, turns: Sequence[Turn]
) -> Iterator[Problem]:
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
                yield Problem(
                    "answer-names-colour",
                    f"turn {number + 1} (assistant) says `{colour}`, the colour of a mark that no "
                    "question named so far; if it means the mark, write its placeholder",
                )


def _says(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def blank_problems(turns: Sequence[Turn]) -> Iterator[Problem]:
    """Yield the answers without a visible character."""
    blank = [
        str(number)
        for number, turn in enumerate(turns, 1)
        if turn.role == "assistant" and not turn.text.strip()
    ]
    if blank:
        message = f"the answer of turn {', '.join(blank)} is blank; remove the turn"
        yield Problem("unsupervised", message)
