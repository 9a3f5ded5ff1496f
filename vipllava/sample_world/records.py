"""Scenes to records in the kinds of the real data, one kind per stage of the recipe.

Images are referenced as they would be in the published annotation files; boxes and segmentations
are in pixels of the stored image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from vipllava.records.kind import OTHERS
from vipllava.records.wording import choose
from vipllava.sample_world.objects import DIGITS, DRAWINGS
from vipllava.sample_world.scenes import Scene, SceneObject

Record = dict[str, Any]

_CAPTION_REQUESTS: Final = (
    "Describe the picture in one sentence.",
    "Write a short caption.",
    "What does the picture show?",
)
_LIST_REQUESTS: Final = (
    "List the objects from left to right.",
    "Which objects do you see, from left to right?",
)


def caption_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """Stage 1: a caption that names the objects from left to right."""
    return _image_record(f"caption{number}", choose(_CAPTION_REQUESTS, rng), caption(scene))


def caption(scene: Scene) -> str:
    """Return the caption, e.g. ``a star, a house and the digit 7.``"""
    names = [noun_phrase(item) for item in scene.objects]
    return f"{', '.join(names[:-1])} and {names[-1]}."


def noun_phrase(item: SceneObject) -> str:
    """Return the object with its article: ``a star``, ``the digit 7``."""
    return f"the digit {item.kind}" if item.kind in DIGITS else f"a {item.kind}"


def relation(first: SceneObject, second: SceneObject) -> str:
    """Return where ``first`` lies as seen from ``second``, along the axis of larger distance."""
    (ax, ay), (bx, by) = (
        ((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (first.bbox_xyxy, second.bbox_xyxy)
    )
    if abs(ax - bx) > abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def list_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """An image-level question about the whole scene."""
    answer = ", ".join(item.kind for item in scene.objects)
    return _image_record(f"list{number}", choose(_LIST_REQUESTS, rng), answer)


def phrase_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A RefCOCOg record: one marked object, answered by its name."""
    (item,) = _pick(scene, 1, rng)
    return {**_marked(f"refcocog-{number}", item), "answer": item.kind}


def asked_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A RefCOCOg record to be asked: beside it, what it would be of the scene's other objects."""
    record = phrase_record(scene, number, rng)
    others = [
        {"bboxes": [list(o.bbox_xyxy)], "segmentations": [o.segmentation], "answer": o.kind}
        for o in scene.objects
        if o.kind != record["answer"]
    ]
    return record | {OTHERS: others}


def phrase_dialogue_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A RefCOCOg-GPT4V record: a dialogue about one marked object."""
    item = _pick(scene, 1, rng)[0]
    turns = _dialogue(
        ("What is the object <bbox>?", f"It is {noun_phrase(item)}."),
        ("What kind of thing is it?", _category(item.category)),
    )
    return {**_marked(f"refcocog-gpt4v-{number}", item), "conversations": turns}


def relation_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A Visual Genome relation: subject, relation and object as a triplet."""
    first, second = _pick(scene, 2, rng)
    answer = f"{first.kind}, {relation(first, second)}, {second.kind}"
    return {**_marked(f"vg_rel-{number}", first, second, masks=False), "answer": answer}


def relation_dialogue_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A Visual Genome GPT4V dialogue about two marked objects."""
    first, second = _pick(scene, 2, rng)
    where = f"It is {relation(first, second)} {noun_phrase(second)}."
    turns = _dialogue(
        ("What is the object <bbox0>?", f"It is {noun_phrase(first)}."),
        ("Where is it, seen from the object <bbox1>?", where),
    )
    name = f"vg_rel-gpt4v-{number}"
    return {**_marked(name, first, second, masks=False), "conversations": turns}


def choice_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A Visual7W record: which of four marked objects is the one asked for."""
    items = _pick(scene, 4, rng)
    answer = items[int(rng.integers(4))]
    question = {"question": f"Which one is {noun_phrase(answer)}?", "answer": [*answer.bbox_xyxy]}
    return {**_marked(f"v7w-{number}", *items, masks=False), **question}


def regions_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A record in the users' format: several marked objects, asked one after the other."""
    items = _pick(scene, int(rng.integers(2, 4)), rng)
    order = rng.permutation(len(items)).tolist()
    questions = [(f"What is the object <bbox{index}>?", items[index].kind) for index in order]
    return {**_marked(f"regions{number}", *items), "conversations": _dialogue(*questions)}


def category_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A record in the users' format: what kind of thing the marked object is."""
    item = _pick(scene, 1, rng)[0]
    turns = _dialogue(("What kind of thing is the object <bbox0>?", _category(item.category)))
    return {**_marked(f"category{number}", item), "conversations": turns}


def sum_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """A record in the users' format: the sum of two marked digits, or of a digit and one."""
    digits = [item for item in _pick(scene, len(scene.objects), rng) if item.kind in DIGITS][:2]
    if len(digits) < 2:
        return category_record(scene, number, rng)
    total = sum(int(item.kind) for item in digits)
    turns = _dialogue(("What is the sum of the digits <bbox0> and <bbox1>?", str(total)))
    return {**_marked(f"sum{number}", *digits), "conversations": turns}


def text_record(number: int, rng: np.random.Generator) -> Record:
    """A text-only record: a little arithmetic, or what kind of thing something is."""
    if rng.random() < 0.5:
        first, second = rng.integers(0, 10, size=2).tolist()
        exchange = f"What is {first} plus {second}?", str(first + second)
    else:
        kind = choose(tuple(DRAWINGS), rng)
        exchange = f"What kind of thing is a {kind}?", _category(DRAWINGS[kind].category)
    return {"id": f"text{number}", "conversations": _dialogue(exchange, image=False)}


RegionRecord = Callable[[Scene, int, np.random.Generator], Record]

FINETUNE_MIX: Final[Mapping[RegionRecord, float]] = {
    phrase_record: 0.42, regions_record: 0.30, list_record: 0.06, relation_record: 0.06,
    choice_record: 0.05, category_record: 0.05, sum_record: 0.03,
}  # fmt: skip
"""Shares of the stage-2 kinds; the rest is text only."""

GPT4V_MIX: Final[Mapping[RegionRecord, float]] = {
    phrase_dialogue_record: 0.2, relation_dialogue_record: 0.1, phrase_record: 0.4,
    regions_record: 0.18, list_record: 0.08,
}  # fmt: skip
"""Shares of the stage-3 kinds: dialogues and a replay of stage 2; the rest is text only."""


def _image_record(name: str, request: str, answer: str) -> Record:
    return {"id": name, "image": f"{name}.jpg", "conversations": _dialogue((request, answer))}


def _dialogue(*exchanges: tuple[str, str], image: bool = True) -> list[dict[str, str]]:
    texts = [text for exchange in exchanges for text in exchange]
    if image:
        texts[0] = f"<image>\n{texts[0]}"
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]


def _marked(name: str, *items: SceneObject, masks: bool = True) -> Record:
    boxes = [list(item.bbox_xyxy) for item in items]
    drawn = {"segmentations": [item.segmentation for item in items]} if masks else {}
    return {"id": name, "image": f"{name}.jpg", "bboxes": boxes, **drawn}


def _pick(scene: Scene, count: int, rng: np.random.Generator) -> list[SceneObject]:
    return [scene.objects[index] for index in rng.permutation(len(scene.objects))[:count]]


def _category(category: str) -> str:
    return f"It is a kind of {category}."
