"""Visual Commonsense Reasoning: a question about marked people and things, then why.

``{"class_names", "question", "answer_choices": [4], "answer_label", "rationale_choices": [4],
"rationale_label"}`` and the clip's ``boxes`` (``[x1, y1, x2, y2, score]``) and ``segms`` (per
object rings of ``[x, y]`` points, or run lengths as of COCO), under ``meta`` or in the record
itself: shards carry them, the released data keep them in one more file per sample (``meta_dir``).
Question and choices are lists that mix words and lists of object indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, cast

import numpy as np

from vipllava.records.fields import Fields, Parsed, is_rle, list_or_empty
from vipllava.records.kind import Outline, RecordKind
from vipllava.records.wording import LETTERS, OPTION_LETTER, Parts, choose, exchange, fill, join
from vipllava.types import BBox, DraftTurn, Mention, Region

_CHOICE_RATE: Final = 0.5
_CLASS_NAME_RATE: Final = 0.5
_SHORTEST_RING: Final = 4
_TEXTS: Final = ("question", "answer_choices", "rationale_choices")
# An interface constant of the released evaluation, with no blank before the last sentence.
_RATIONALE: Final = (
    "I give you a question and its answer, I need you to provide a rationale explaining why the "
    'answer is right. "{}" The answer is "{}".What is the rationale for this decision?'
)
_Tokens = list["str | list[int]"]
_CLOSE: Final = frozenset(".,?!:;")

_ASK: Final = (
    "Look at the image and answer: {}",
    "Using the image, answer this question: {}",
    "Here is a question about the image: {}",
    "{}",
)
_WHY: Final = (
    "Why?",
    "Why do you think so?",
    "What makes you say so?",
    "Which reason supports your answer?",
    "How do you know?",
    "Explain your answer.",
)
_CHOOSE: Final = (
    " Choose one of these: {}",
    " The options are: {}",
    " Pick the right option: {}",
    " Select from: {}",
)
# How a choice is told, as published: of 14 draws 4 are the letter only, 10 letter and content.
_LETTER: Final = ("({})", "{}", "The answer is ({}).", "Option ({}) is right.")
_LETTER_AND_CONTENT: Final = (
    "({}) {}",
    "{}. {}",
    "{}: {}",
    "The answer is ({}) {}",
    "Option ({}) is right: {}",
)
_FORMS: Final = (*_LETTER, *_LETTER_AND_CONTENT, *_LETTER_AND_CONTENT)


class _Speaker:
    """Turns lists of words and object indices into text with mentions."""

    def __init__(
        self, fields: Fields, rng: np.random.Generator, class_name_rate: float = _CLASS_NAME_RATE
    ) -> None:
        self.fields = fields
        self.rng = rng
        self.class_name_rate = class_name_rate
        self.class_names = fields.items("class_names", "a list with the class of each object")
        clip = _clip(fields.record)
        if clip is None:
            fields.fail("meta", fields.record["meta"], "an object with `boxes` and `segms`")
        expected = f"one entry per object of class_names ({len(self.class_names)})"
        for name in ("boxes", "segms"):
            if clip.get(name) is None:
                fields.refuse(
                    f"`{name}` of the clip is missing; expected it under `meta` (shards carry the "
                    f"content of meta_dir, {fields.record.get('meta_dir')!r})"
                )
            fields.as_list(clip[name], name, expected, len(self.class_names))
        self.boxes, self.rings = clip["boxes"], clip["segms"]
        self.regions: dict[int, Region] = {}  # by object, in the order of their first mention

    def check(self, tokens: object, name: str) -> _Tokens:
        """Check one question or choice, whether it will be said or not."""
        expected = "a list that mixes words and lists of object indices"
        checked: _Tokens = []
        for token in self.fields.as_list(tokens, name, expected):
            if isinstance(token, str):
                checked.append(token)
                continue
            indices = self.fields.as_list(token, name, expected)
            if not indices:
                self.fields.fail(name, indices, "at least one object index")
            last = len(self.boxes) - 1
            for index in indices:
                if type(index) is not int or not 0 <= index <= last:
                    self.fields.fail(name, index, f"an object index from 0 to {last} of this clip")
            checked.append(indices)
        if not any(checked):
            self.fields.fail(name, tokens, expected)
        return checked

    def say(self, tokens: _Tokens) -> Parts:
        """Write one question or choice; of its words only a leading "the" changes case."""
        parts: list[str | Mention] = []
        for token in tokens:
            if parts and not (isinstance(token, str) and token in _CLOSE):
                parts.append(" ")
            parts += (token,) if isinstance(token, str) else self._objects(token)
        said = join(parts)
        first, *others = said
        if isinstance(first, str) and f"{first} ".startswith("the "):
            return (f"T{first[1:]}", *others)
        return said

    def _objects(self, indices: list[int]) -> list[str | Mention]:
        parts: list[str | Mention] = []
        for index in indices:
            noun = self.class_names[index]
            if not isinstance(noun, str) or not noun:
                self.fields.fail(f"class_names[{index}]", noun, "the object's class, a text")
            if self.rng.random() >= self.class_name_rate:
                noun = choose(("object", "instance"), self.rng)
            parts += [" and the " if parts else "the ", f"{noun} ", Mention(self._region(index))]
        return parts

    def _region(self, index: int) -> int:
        """Return the number of an object's region."""
        if index not in self.regions:
            box = self.fields.bbox(self.boxes[index], f"boxes[{index}]", extra=1)
            self.regions[index] = self._masked(box, self.rings[index], f"segms[{index}]")
        return list(self.regions).index(index)

    def _masked(self, box: BBox, mask: Any, where: str) -> Region:
        if is_rle(mask):
            return Region(box, rle=self.fields.run_lengths(mask, where))
        polygons = tuple(
            self.fields.polygon(ring, f"{where}[{number}]")
            for number, ring in enumerate(self.fields.as_list(mask, where, "a list of rings"))
            if len(self.fields.as_list(ring, where, "a list of points")) >= _SHORTEST_RING
        )
        return Region(box, polygons)


def parse_vcr(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Ask the question, then why; each with its four options half of the time.

    Only objects that the text mentions become regions; one object is one region, so it keeps its
    mark through all turns.
    """
    speaker = _Speaker(fields, rng)
    question = speaker.check(fields.require("question", "a list of words"), "question")
    turns = _ask(speaker, speaker.say(question), "answer") + _ask(speaker, None, "rationale")
    return Parsed(turns, tuple(speaker.regions.values()))


def parse_vcr_task(
    fields: Fields, rng: np.random.Generator, *, what: Literal["answer", "rationale"]
) -> Parsed:
    """Ask for the letter of the right answer, or of the rationale of the right answer.

    As the benchmark does: one turn, class names always, and only the objects that this turn
    mentions are regions.
    """
    speaker = _Speaker(fields, rng, class_name_rate=1.0)
    asked = speaker.say(speaker.check(fields.require("question", "a list of words"), "question"))
    if what == "rationale":
        choices, label = _choices(speaker, "answer")
        asked = fill(_RATIONALE, asked, speaker.say(choices[label]))
    choices, label = _choices(speaker, what)
    parts: list[str | Mention] = [*asked, "\n"]
    for letter, choice in zip(LETTERS, choices, strict=True):
        parts += [f"{letter}. ", *speaker.say(choice), "\n"]
    turns = exchange(join([*parts, OPTION_LETTER]), LETTERS[label])
    return Parsed(turns, tuple(speaker.regions.values()))


def _choices(speaker: _Speaker, what: str) -> tuple[list[_Tokens], int]:
    """Return the four answers or rationales, checked, and the number of the right one."""
    name = f"{what}_choices"
    given = speaker.fields.items(name, "a list of 4 choices", len(LETTERS))
    choices = [speaker.check(choice, f"{name}[{number}]") for number, choice in enumerate(given)]
    return choices, speaker.fields.index(f"{what}_label", len(LETTERS))


def _ask(speaker: _Speaker, question: Parts | None, what: str) -> tuple[DraftTurn, ...]:
    """Write one exchange; ``question`` None asks why."""
    rng = speaker.rng
    choices, label = _choices(speaker, what)
    asked = (choose(_WHY, rng),) if question is None else fill(choose(_ASK, rng), question)
    if rng.random() >= _CHOICE_RATE:
        answer = speaker.say(choices[label])
    else:
        said = [speaker.say(choice) for choice in choices]
        options: list[str | Mention] = []
        for letter, option in zip(LETTERS, said, strict=True):
            options += [f"{' ' if options else ''}({letter}) ", *option]
        asked = join([*asked, *fill(choose(_CHOOSE, rng), tuple(options))])
        form = choose(_FORMS, rng)
        answer = fill(form, LETTERS[label], *((said[label],) if form not in _LETTER else ()))
    return exchange(asked, answer, has_image=question is not None)


def _clip(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what holds boxes and rings per object: ``meta``, or the record itself."""
    holder: Any = record.get("meta", record)
    return cast("Mapping[str, Any]", holder) if isinstance(holder, Mapping) else None


def _outlines(record: Mapping[str, Any]) -> Iterator[Outline]:
    """Yield the boxes and rings of the objects that any text mentions, said or not."""
    clip = _clip(record) or {}
    given = {name: list_or_empty(clip.get(name)) for name in ("boxes", "segms")}
    for index in sorted(set(_integers([record.get(name) for name in _TEXTS]))):
        if 0 <= index < len(given["boxes"]):
            yield Outline("box", given["boxes"][index], f"boxes[{index}]", extra=1)
        if 0 <= index < len(given["segms"]) and is_rle(given["segms"][index]):
            yield Outline("mask", given["segms"][index], f"segms[{index}]")
        elif 0 <= index < len(given["segms"]):
            for number, ring in enumerate(list_or_empty(given["segms"][index])):
                if len(list_or_empty(ring)) >= _SHORTEST_RING:
                    yield Outline("ring", ring, f"segms[{index}][{number}]")


def _integers(value: object) -> Iterator[int]:
    for item in list_or_empty(value):
        if type(item) is int:
            yield item
        else:
            yield from _integers(item)


VCR = RecordKind(
    "vcr",
    parse_vcr,
    texts=_TEXTS,
    policy="vcr",
    prefix="vcr",
    fields=(
        "class_names", *_TEXTS, "answer_label", "rationale_label", "meta", "meta_dir", "boxes",
        "segms",
    ),
    outlines=_outlines,
)  # fmt: skip
VCR_QA = replace(VCR, name="vcr_qa", parse=partial(parse_vcr_task, what="answer"), prefix=None)
VCR_QAR = replace(VCR_QA, name="vcr_qar", parse=partial(parse_vcr_task, what="rationale"))
