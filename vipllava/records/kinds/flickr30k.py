"""Flickr30k entities: a caption whose phrases are marked in the image.

``{"bbox": [[box, ...] per phrase], "grounding": "A man <bbox0> throws a ball <bbox1> ."}``
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from vipllava.records.fields import Fields, Parsed, list_or_empty
from vipllava.records.kind import Outline, RecordKind
from vipllava.records.wording import capitalised, choose, exchange, join
from vipllava.types import Mention, Region

_HINT_RATE: Final = 0.5
_MARKS_RATE: Final = 0.5
_PHRASE_END: Final = re.compile(r"\s*<bbox(\d{1,9})>")
_SPACE_BEFORE_END: Final = re.compile(r"\s+([.,!?;:])")

_NAME_OBJECTS: Final = (
    "Describe the image through its marked objects. Name the objects, not their marks.",
    "Write one sentence about the image that covers the marked objects; leave the marks out.",
    "What does the image show? Build the description on the marked objects without saying how "
    "they are marked.",
)
_NAME_BOTH: Final = (
    "Describe the image through its marked objects. Name each object together with its mark.",
    "Write one sentence about the image that covers the marked objects; after each object, say "
    "which mark it has.",
    "What does the image show? Build the description on the marked objects and say how each one "
    "is marked.",
)
_HINTS: Final = (
    " The marked objects are those ",
    " Hint: look at the objects ",
    " Marked are those ",
)


def parse_flickr30k(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask for the caption; all boxes of a phrase share one mark style."""
    caption = fields.text("grounding")
    phrases = fields.items("bbox", "a list of boxes per phrase")
    order = _marked_phrases(caption)
    if not order:
        fields.fail("grounding", caption, "a caption with <bboxN> after its phrases")
    regions: list[Region] = []
    first: dict[int, int] = {}
    for phrase in order:
        where = f"bbox[{phrase}]"
        if phrase >= len(phrases):
            expected = f"a phrase of `bbox`, which has {len(phrases)}"
            fields.fail("grounding", f"<bbox{phrase}>", expected, "placeholder-without-region")
        boxes = fields.as_list(phrases[phrase], where, "a list of boxes")
        if not boxes:
            fields.fail(where, boxes, "at least one box: the caption marks this phrase")
        first[phrase] = len(regions)
        for number, box in enumerate(boxes):
            style_of = first[phrase] if number else None
            regions.append(Region(fields.bbox(box, f"{where}[{number}]"), (), style_of))
    name_marks = rng.random() < _MARKS_RATE
    question: list[str | Mention] = [choose(_NAME_BOTH if name_marks else _NAME_OBJECTS, rng)]
    if rng.random() < _HINT_RATE:
        question.append(choose(_HINTS, rng))
        for phrase in order:
            question += [Mention(first[phrase]), ", "]
        question[-1] = "."
        if len(order) > 1:
            question[-3] = " and "
    answer = _answer(caption, first if name_marks else None)
    return Parsed(exchange(join(question), answer), tuple(regions))


def _answer(caption: str, first: dict[int, int] | None) -> tuple[str | Mention, ...]:
    """Return the caption as a sentence, with marks after its phrases or without."""
    parts: list[str | Mention] = []
    for number, piece in enumerate(_PHRASE_END.split(caption.strip())):
        if number % 2 == 0:
            parts.append(_SPACE_BEFORE_END.sub(r"\1", piece))
        elif first is not None:
            parts += [" ", Mention(first[int(piece)])]
    parts = list(capitalised(join(parts)))
    if not isinstance(parts[-1], str) or not parts[-1].rstrip().endswith((".", "!", "?")):
        parts.append(".")
    return join(parts)


def _marked_phrases(caption: str) -> list[int]:
    return list(dict.fromkeys(map(int, _PHRASE_END.findall(caption))))


def _outlines(record: Mapping[str, Any]) -> Iterator[Outline]:
    """Yield the boxes of the phrases that the caption marks."""
    caption, phrases = record.get("grounding"), list_or_empty(record.get("bbox"))
    for phrase in _marked_phrases(caption) if isinstance(caption, str) else ():
        boxes = list_or_empty(phrases[phrase]) if phrase < len(phrases) else ()
        for number, box in enumerate(boxes):
            yield Outline("box", box, f"bbox[{phrase}][{number}]")


FLICKR30K = RecordKind(
    "flickr30k",
    parse_flickr30k,
    texts=("grounding",),
    policy="flickr30k",
    prefix="flickr30k",
    fields=("bbox", "grounding"),
    outlines=_outlines,
    mentions=("grounding", "bbox"),
)
