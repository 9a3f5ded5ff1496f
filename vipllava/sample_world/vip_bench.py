"""A sample ViP-Bench in the official folder layout, from held-out scenes.

``{bbox,human}/{questions.jsonl,images/}`` hold the marked images and the questions worded for
them, ``source_image/`` the clean images with the annotation of their regions, and
``vip-bench-meta-data.json`` question, answer and capabilities per item. The ``bbox`` split marks
with rectangles; the ``human`` split with any of the eight shapes, as an annotator would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from vipllava.keyed_random import generator_for
from vipllava.sample_world.objects import DIGITS
from vipllava.sample_world.records import noun_phrase, relation
from vipllava.sample_world.scenes import Scene, SceneObject, compose_scene
from vipllava.visual_prompts.policies import ShapeRanges, VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import prompt_words

META_DATA: Final = "vip-bench-meta-data.json"
OBJECT: Final = "<obj>"
NUM_ITEMS: Final = 60

_RANGES: Final = ShapeRanges(
    anchor=168,
    rectangle_width=(2, 4),
    ellipse_width=(2, 4),
    triangle_width=(2, 4),
    scribble_width=(2, 4),
    arrow_width=(2, 4),
    point_radius=(5, 9),
    ellipse_scale=(1.0, 1.3),
    arrow_head_min=7.0,
    alpha=(160, 255),
    mask_alpha=(96, 128),
)
_SPLITS: Final = {
    "bbox": VisualPromptPolicy(
        shapes=("rectangle",), ranges=_RANGES, named_colour_rate=1.0, distinguishable=True
    ),
    "human": VisualPromptPolicy(ranges=_RANGES, named_colour_rate=1.0, distinguishable=True),
}


@dataclass(frozen=True, slots=True)
class _Item:
    question: str
    answer: str
    capability: tuple[str, ...]
    objects: tuple[SceneObject, ...]


def _recognise(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item:
    item = (drawn or digits)[0]
    return _Item(f"What is the object {OBJECT}?", item.kind, ("rec",), (item,))


def _read(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item | None:
    if not digits:
        return None
    answer = f"{digits[0].kind}<OR>the digit {digits[0].kind}"
    return _Item(f"What is the object {OBJECT}?", answer, ("ocr", "rec"), (digits[0],))


def _add(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item | None:
    if len(digits) < 2:
        return None
    total = str(int(digits[0].kind) + int(digits[1].kind))
    question = f"What is the sum of the digits {OBJECT} and {OBJECT}?"
    return _Item(question, total, ("ocr", "math"), (digits[0], digits[1]))


def _know(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item | None:
    if not drawn:
        return None
    question = f"What kind of thing is the object {OBJECT}?"
    return _Item(question, drawn[0].category, ("rec", "know"), (drawn[0],))


def _relate(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item:
    first, second = scene.objects[0], scene.objects[-1]
    question = (
        f"How does the subject {OBJECT} relate to the object {OBJECT}? Answer with a short "
        "triplet (subject, relation, object)."
    )
    answer = f"{first.kind}<AND>{relation(first, second)}<AND>{second.kind}"
    return _Item(question, answer, ("rec", "rel"), (first, second))


def _tell(scene: Scene, digits: list[SceneObject], drawn: list[SceneObject]) -> _Item | None:
    if not drawn:
        return None
    question = f"Describe the object {OBJECT} in a short phrase."
    answer = f"{drawn[0].kind}<OR>{noun_phrase(drawn[0])}"
    return _Item(question, answer, ("rec", "lang"), (drawn[0],))


_QUESTIONS: Final[
    tuple[Callable[[Scene, list[SceneObject], list[SceneObject]], _Item | None], ...]
] = (_recognise, _read, _add, _know, _relate, _tell)


def write_vip_bench(folder: Path, num_items: int = NUM_ITEMS) -> None:
    """Write the benchmark; equal arguments give equal bytes."""
    meta: dict[str, Any] = {}
    lines: dict[str, list[str]] = {split: [] for split in _SPLITS}
    for split in _SPLITS:
        (folder / split / "images").mkdir(parents=True)
    (folder / "source_image").mkdir()
    for number in range(num_items):
        rng = generator_for("sample_world", "vip_bench", number)
        scene, item = _compose(_QUESTIONS[number % len(_QUESTIONS)], rng)
        name = f"{number:04d}.jpg"
        (folder / "source_image" / name).write_bytes(scene.jpeg())
        annotation = {
            "bboxes": [list(o.bbox_xyxy) for o in item.objects],
            "segmentations": [
                [[value for vertex in ring for value in vertex] for ring in o.polygons]
                for o in item.objects
            ],
        }
        (folder / "source_image" / f"{number:04d}.json").write_text(
            json.dumps(annotation) + "\n", encoding="utf-8"
        )
        meta[f"v1_{number}"] = {
            "image_source": "sample_world",
            "image": name,
            "question": item.question,
            "answer": item.answer,
            "capability": list(item.capability),
        }
        for split, policy in _SPLITS.items():
            plan = sample_plan([o.region for o in item.objects], scene.image.size, policy, rng)
            marked = Scene(render_plan(scene.image, plan), scene.objects)
            (folder / split / "images" / name).write_bytes(marked.jpeg())
            text = item.question
            for prompt in plan.prompts:
                text = text.replace(OBJECT, prompt_words(prompt), 1)
            line = {"question_id": number, "image": name, "text": text}
            lines[split].append(json.dumps(line))
    for split, texts in lines.items():
        (folder / split / "questions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (folder / META_DATA).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _compose(
    question: Callable[[Scene, list[SceneObject], list[SceneObject]], _Item | None],
    rng: np.random.Generator,
) -> tuple[Scene, _Item]:
    """Compose scenes until one has what the question needs; most have."""
    while True:
        scene = compose_scene(rng, "heldout")
        order = [scene.objects[int(index)] for index in rng.permutation(len(scene.objects))]
        digits = [item for item in order if item.kind in DIGITS]
        drawn = [item for item in order if item.kind not in DIGITS]
        if (item := question(scene, digits, drawn)) is not None:
            return scene, item
