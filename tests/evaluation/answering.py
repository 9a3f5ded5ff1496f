"""Models that need no weights, and items of a flat grey image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import Bench, BenchData, Item, Marks, Prediction
from vipllava.evaluation.journal import Journal
from vipllava.types import DraftTurn, Failure, Mention, Region, Request, Sample
from vipllava.visual_prompts.policies import VisualPromptPolicy

GREY = (90, 90, 90)
POLICIES = {"refcocog": VisualPromptPolicy(distinguishable=True)}

META = {
    "v1_0": {
        "image_source": "toy", "image": "0.png", "question": "What is <obj>?",
        "answer": "star", "capability": ["rec"],
    },
    "v1_1": {
        "image_source": "toy", "image": "1.png", "question": "<obj> plus <obj>?",
        "answer": "7<OR>seven", "capability": ["ocr", "math"],
    },
    "v1_2": {
        "image_source": "toy", "image": "2.png", "question": "How is <obj>?",
        "answer": "left<AND>cup", "capability": ["rec", "rel"],
    },
}  # fmt: skip


class Says:
    """Answers every request with what a function says of it, a few at a time."""

    several_images = False

    def __init__(self, say: Callable[[Request], str | Failure], at_once: int = 3) -> None:
        self.say, self.at_once = say, at_once
        self.asked: list[Request] = []

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, str | Failure]]:
        chunk: list[tuple[int, str | Failure]] = []
        for number, request in enumerate(requests):
            self.asked.append(request)
            chunk.append((number, self.say(request)))
            if len(chunk) == self.at_once:
                yield from reversed(chunk)  # in whatever order
                chunk = []
        yield from reversed(chunk)


def is_plain(image: Image.Image | None) -> bool:
    assert image is not None
    return image.getextrema() == tuple((value, value) for value in GREY)


def grey_image(name: str = "") -> bytes:
    """Return a file that is another one for each name: an image of its own."""
    said = PngInfo()
    said.add_text("name", name)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), GREY).save(buffer, format="PNG", pnginfo=said)
    return buffer.getvalue()


def grey_sample(key: str, answer: str, box: tuple[float, ...] = (8, 8, 40, 40)) -> Sample:
    turns = (
        DraftTurn("user", ("What is ", Mention(0), "?"), has_image=True),
        DraftTurn("assistant", (answer,)),
    )
    x1, y1, x2, y2 = box
    return Sample(key, "toy", grey_image(key), (Region((x1, y1, x2, y2)),), turns, "refcocog")


def evaluated(
    bench: Bench,
    items: Iterable[Item],
    say: Callable[[Request], str | Failure] | Says,
    folder: Path,
    marks: tuple[Marks, ...] = ("kept",),
    data: BenchData | None = None,
    **protocol,
) -> list[Prediction]:
    """Return the scored predictions of all markings."""
    model = say if isinstance(say, Says) else Says(say)
    how = Protocol(
        **{"policies": POLICIES, "seed": 1, "resize": bench.resize} | protocol, marks=marks
    )
    found = ask_items(items, how, lambda: model, Journal(folder, {"seed": 1}))
    scored: list[Prediction] = []
    for asked in found.values():
        answered = [each for each in asked if each.has_answer]
        by_key = {each.key: each for each in bench.score(answered, data)}  # pyright: ignore
        scored += [by_key.get(each.key, each) for each in asked]
    return scored


def make_vip_bench(folder: Path) -> Path:
    """Write three questions of :data:`META`, each split in its own words, about three images."""
    for split in ("bbox", "human"):
        images = folder / split / "images"
        images.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.png")
        lines = [
            json.dumps({"question_id": n, "image": item["image"], "text": f"{split} {n}?"})
            for n, item in enumerate(META.values())
        ]
        (folder / split / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "vip-bench-meta-data.json").write_text(json.dumps(META))
    return folder
