"""Controls of faithfulness: models that never look at a mark, and one that looks perfectly."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from tests.evaluation.test_published_benches import ask, bench_data
from tests.toy_data import encode_picture
from vipllava.evaluation.bench import ALL_MARKS
from vipllava.evaluation.summary import summarise
from vipllava.records.image_decode import decode_image
from vipllava.types import Request
from vipllava.visual_prompts.shapes import PALETTE

BOXES = [[5, 5, 60, 60], [70, 5, 130, 60], [5, 70, 60, 130], [140, 70, 200, 200]]
RECORDS = [
    {"id": f"v7w-{n}", "bboxes": BOXES, "question": f"Which is {n}?", "answer": BOXES[n * 7 % 4]}
    for n in range(40)
]


def faithful(folder: Path, say: Callable[[Request], str]) -> dict[str, Any]:
    _, found = ask("v7w", bench_data(folder, RECORDS, ALL_MARKS), say, folder / "out")
    assert len(found) == 40 * len(ALL_MARKS)
    assert not any(each.failure for each in found)
    return summarise(found, 0.25)["faithfulness"]


def look(request: Request) -> str:
    """Say the letter of the option whose colour is on the right object, or that there is none."""
    number = int(request.key.rpartition("-")[2])
    x1, y1, _, y2 = BOXES[number * 7 % 4]
    at = (x1, (y1 + y2) // 2)
    stored = decode_image(encode_picture(320, 240, seed=number // 2), "stored")
    assert request.image is not None
    seen, before = (np.array(image.getpixel(at)) for image in (request.image, stored))
    if (seen == before).all():
        return "there is no mark"
    colour = (seen - before * 127 / 255) * 255 / 128
    options = re.findall(r"([A-D])\. .*?(\w+) rectangle", request.turns[-1].text)
    distance = {letter: np.abs(colour - PALETTE[name]).sum() for letter, name in options}
    return min(distance, key=lambda letter: distance[letter])


def test_a_model_that_looks_perfectly(tmp_path: Path):
    found = faithful(tmp_path, look)
    assert {name: found[name]["score"] for name in ("follows", "gap", "stays")} == {
        "follows": 1, "gap": 1, "stays": 1,
    }  # fmt: skip
    assert (found["left"], found["chance"]) == (0, 0.25)
    assert found["follows"]["num_items"] == 40


@pytest.mark.parametrize(
    "say",
    [
        lambda request: "C",
        lambda request: "ABCD"[crc32(request.turns[-1].text.encode()) % 4],
        lambda request: "ABCD"[int(request.key.rpartition("-")[2]) * 7 % 4],
    ],
    ids=["always the same", "by the words", "knows the right answer by heart"],
)
def test_a_model_that_never_looks_at_the_image_follows_nothing(say, tmp_path: Path):
    found = faithful(tmp_path, say)
    assert found["follows"]["score"] == 0
    assert found["gap"]["score"] == 0


def test_a_model_that_guesses_anew_for_each_image_follows_as_chance_has_it(tmp_path: Path):
    """Two guesses among four are right in one of sixteen items: 2.5 of 40."""

    def guess(request: Request) -> str:
        assert request.image is not None
        return "ABCD"[crc32(request.image.tobytes()) % 4]

    found = faithful(tmp_path, guess)
    assert found["follows"]["low"] < 0.0625 < found["follows"]["high"]
    assert found["gap"]["low"] < 0 < found["gap"]["high"]
