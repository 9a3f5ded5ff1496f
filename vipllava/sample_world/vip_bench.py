"""A sample ViP-Bench in the official folder layout, from held-out scenes.

``{bbox,human}/{questions.jsonl,images/}`` hold the marked images and the questions worded for
them, ``source_image/`` the clean images with the annotation of their regions, and
``vip-bench-meta-data.json`` question, answer and capabilities per item. The ``bbox`` split marks
with rectangles; the ``human`` split with any of the eight shapes, as an annotator would.
"""

from __future__ import annotations

import json
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

OBJECT: Final = "<obj>"
_NUM_ITEMS: Final = 60
_KINDS: Final = ("recognise", "read", "add", "know", "relate", "tell")

_RANGES: Final = ShapeRanges(
    anchor=168, rectangle_width=(2, 4), ellipse_width=(2, 4), triangle_width=(2, 4),
    scribble_width=(2, 4), arrow_width=(2, 4), point_radius=(5, 9), ellipse_scale=(1.0, 1.3),
    arrow_head_min=7.0, alpha=(160, 255), mask_alpha=(96, 128),
)  # fmt: skip
_SPLITS: Final = {
    "bbox": VisualPromptPolicy(
        shapes=("rectangle",), ranges=_RANGES, named_colour_rate=1.0, distinguishable=True
    ),
    "human": VisualPromptPolicy(ranges=_RANGES, named_colour_rate=1.0, distinguishable=True),
}


# Question, answer, capabilities, and the objects asked about.
_Item = tuple[str, str, tuple[str, ...], tuple[SceneObject, ...]]


def _make_item(kind: str, scene: Scene, rng: np.random.Generator) -> _Item | None:
    """Return the question of a kind, or None if the scene lacks what it is about."""
    order = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    digits = [item for item in order if item.kind in DIGITS]
    drawn = [item for item in order if item.kind not in DIGITS]
    match kind:
        case "recognise":
            item = (*drawn, *digits)[0]
            return f"What is the object {OBJECT}?", item.kind, ("rec",), (item,)
        case "read" if digits:
            answer = f"{digits[0].kind}<OR>the digit {digits[0].kind}"
            return f"What is the object {OBJECT}?", answer, ("ocr", "rec"), (digits[0],)
        case "add" if len(digits) >= 2:
            total = str(int(digits[0].kind) + int(digits[1].kind))
            question = f"What is the sum of the digits {OBJECT} and {OBJECT}?"
            return question, total, ("ocr", "math"), (digits[0], digits[1])
        case "know" if drawn:
            question = f"What kind of thing is the object {OBJECT}?"
            return question, drawn[0].category, ("rec", "know"), (drawn[0],)
        case "relate":
            first, second = scene.objects[0], scene.objects[-1]
            question = (
                f"How does the subject {OBJECT} relate to the object {OBJECT}? Answer with a short "
                "triplet (subject, relation, object)."
            )
            answer = f"{first.kind}<AND>{relation(first, second)}<AND>{second.kind}"
            return question, answer, ("rec", "rel"), (first, second)
        case "tell" if drawn:
            question = f"Describe the object {OBJECT} in a short phrase."
            answer = f"{drawn[0].kind}<OR>{noun_phrase(drawn[0])}"
            return question, answer, ("rec", "lang"), (drawn[0],)
        case _:
            return None


def write_vip_bench(folder: Path) -> None:
    """Write the benchmark; the bytes are the same every time."""
    meta: dict[str, Any] = {}
    lines: dict[str, list[str]] = {split: [] for split in _SPLITS}
    source = folder / "source_image"
    for images in (source, *(folder / split / "images" for split in _SPLITS)):
        images.mkdir(parents=True)
    for number in range(_NUM_ITEMS):
        rng = generator_for("sample_world", "vip_bench", number)
        scene, (question, answer, capability, objects) = _compose(_KINDS[number % len(_KINDS)], rng)
        name = f"{number:04d}.jpg"
        (source / name).write_bytes(scene.jpeg())
        annotation = {
            "bboxes": [list(each.bbox_xyxy) for each in objects],
            "segmentations": [each.segmentation for each in objects],
        }
        _write_text(source / f"{number:04d}.json", json.dumps(annotation))
        meta[f"v1_{number}"] = {
            "image_source": "sample_world",
            "image": name,
            "question": question,
            "answer": answer,
            "capability": list(capability),
        }
        for split, policy in _SPLITS.items():
            regions = [each.region for each in objects]
            plan = sample_plan(regions, scene.image.size, policy, rng)
            marked = Scene(render_plan(scene.image, plan), scene.objects)
            (folder / split / "images" / name).write_bytes(marked.jpeg())
            text = question
            for prompt in plan.prompts:
                text = text.replace(OBJECT, prompt_words(prompt), 1)
            lines[split].append(json.dumps({"question_id": number, "image": name, "text": text}))
    for split, texts in lines.items():
        _write_text(folder / split / "questions.jsonl", "\n".join(texts))
    _write_text(folder / "vip-bench-meta-data.json", json.dumps(meta, indent=1))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _compose(kind: str, rng: np.random.Generator) -> tuple[Scene, _Item]:
    """Compose scenes until one has what the question needs; most have."""
    while True:
        scene = compose_scene(rng, "heldout")
        if item := _make_item(kind, scene, rng):
            return scene, item
