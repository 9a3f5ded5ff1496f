"""The region benchmark: marks drawn or not, exact scores, the files it writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import ClassVar

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.toy_data import lying_sample
from vipllava.evaluation.bench import ask_all
from vipllava.evaluation.benches import regions
from vipllava.types import ConfigError, DraftTurn, Mention, RecordError, Region, Sample
from vipllava.visual_prompts.policies import VisualPromptPolicy

POLICIES = {"refcocog": VisualPromptPolicy()}
GREY = (90, 90, 90)


def sample(key: str, answer: str) -> Sample:
    buffer = io.BytesIO()
    different = PngInfo()  # another file for every key: other images
    different.add_text("key", key)
    Image.new("RGB", (64, 48), GREY).save(buffer, format="PNG", pnginfo=different)
    turns = (
        DraftTurn("user", ("What is ", Mention(0), "?"), has_image=True),
        DraftTurn("assistant", (answer,)),
    )
    return Sample(key, "toy", buffer.getvalue(), (Region((8, 8, 40, 40)),), turns, "refcocog")


class Looker:
    """Answers `star` if the picture has a mark, else `cup`."""

    def __init__(self, star: str = " Star"):
        self.star = star

    def answer(self, requests, *, max_new_tokens=64, batch_size=16):
        return ["cup" if _is_plain(r.image) else self.star for r in requests]


def _is_plain(image: Image.Image) -> bool:
    return image.getextrema() == tuple((value, value) for value in GREY)


def test_the_control_draws_nothing_and_keeps_the_words():
    first, second = (
        next(regions.read_questions([sample("a", "star")], POLICIES, seed=1)) for _ in range(2)
    )
    assert first.marked.tobytes() == second.marked.tobytes()
    assert not _is_plain(first.marked)
    assert _is_plain(first.unmarked)
    assert first.shape in first.text
    assert first.answer == "star"


@pytest.mark.parametrize("upright", [True, False])
def test_published_pictures_are_asked_about_as_they_are_stored(upright: bool):
    (_, _, image, _), size = lying_sample(upright)
    lying = replace(sample("a", "star"), image=image, upright=upright)
    question = next(regions.read_questions([lying], POLICIES, seed=1))
    assert question.marked.size == question.unmarked.size == size


def answered(samples, model=None, draw_marks="both", batch_size=16):
    asked = regions.ask(regions.read_questions(samples, POLICIES, seed=1), draw_marks)
    return ask_all(asked, model or Looker(), max_new_tokens=16, batch_size=batch_size)


def test_scores_are_exact():
    samples = [sample(str(i), "star" if i < 3 else "cup") for i in range(4)]
    results = regions.score(answered(samples))
    assert results["num_questions"] == 4
    assert results["marked"]["correct"] == 3
    assert results["marked"]["accuracy"] == 0.75
    assert (results["marked"]["low"], results["marked"]["high"]) == (0.25, 1.0)
    assert results["unmarked"]["accuracy"] == 0.25
    assert results["gap"] == {"accuracy": 0.5, "low": -0.5, "high": 1.0}
    assert sum(row["marked"]["total"] for row in results["by_shape"].values()) == 4


def test_a_full_stop_is_a_mistake_and_right_in_the_lenient_figure_beside():
    results = regions.score(answered([sample("a", "star")], Looker("Star.")))
    assert results["marked"]["correct"] == 0
    assert results["marked"]["accuracy"] == 0
    assert results["marked"]["lenient_accuracy"] == 1
    assert results["unmarked"]["lenient_accuracy"] == 0
    assert regions.REGIONS.table(results).total[2:] == ("0.0", "0.0", "100.0")  # one image


def test_the_table_ends_with_all_shapes():
    results = regions.score(answered([sample("a", "star"), sample("b", "cup")]))
    table = regions.REGIONS.table(results)
    assert table.columns == (
        "shape", "questions", "with marks", "marks not drawn", "punctuation aside",
    )  # fmt: skip
    assert [row[0] for row in table.rows] == sorted(results["by_shape"])
    assert table.total == ("all", "2", "50.0 (0.0-100.0)", "50.0 (0.0-100.0)", "50.0")


@pytest.mark.parametrize(
    ("draw_marks", "asked", "left_out"),
    [(True, "marked", "unmarked"), (False, "unmarked", "marked")],
)
def test_one_half_alone(draw_marks, asked, left_out):
    results = regions.score(answered([sample("a", "star")], draw_marks=draw_marks))
    assert results[asked]["total"] == 1
    assert results[left_out] is None
    assert results["gap"] is None
    assert "-" in regions.REGIONS.table(results).total


@pytest.mark.parametrize("value", ["maybe", "true", 1, None])
def test_marks_are_drawn_not_drawn_or_both(value):
    with pytest.raises(ConfigError, match=f"draw_marks={value}: expected one of true, false, both"):
        regions.RegionsOptions(draw_marks=value)


def test_images_are_held_a_few_batches_at_a_time():
    drawn = []

    def samples():
        for number in range(40):
            drawn.append(number)
            yield sample(str(number), "star")

    class Counter(Looker):
        asked: ClassVar[list[tuple[int, int]]] = []

        def answer(self, requests, **settings):
            self.asked.append((len(drawn), len(requests)))
            return super().answer(requests)

    found = answered(samples(), Counter(), batch_size=1)
    assert Counter.asked == [(8, 16), (16, 16), (24, 16), (32, 16), (40, 16)]
    assert [each.key for each in found] == [f"toy/{number}" for number in range(40)]
    assert {tuple(each.texts.items()) for each in found} == {
        (("marked", " Star"), ("unmarked", "cup"))
    }


def test_the_file_of_predictions():
    found = answered([sample("a", "star"), sample("b", "é")])
    ((name, text),) = regions.REGIONS.files(found).items()
    assert name == "predictions.jsonl"
    lines = [json.loads(line) for line in text.splitlines()]
    assert list(lines[0]) == [
        "key", "question", "shape", "answer", "image", "marked", "unmarked",
    ]  # fmt: skip
    assert lines[0]["image"] != lines[1]["image"]
    assert [(line["key"], line["answer"], line["marked"], line["unmarked"]) for line in lines] == [
        ("toy/a", "star", " Star", "cup"),
        ("toy/b", "é", " Star", "cup"),
    ]


def test_records_that_ask_nothing_are_errors():
    text_only = Sample("t", "toy", None, (), (DraftTurn("user", ("hi",)),), "refcocog")
    with pytest.raises(RecordError, match="toy/t cannot be asked"):
        next(regions.read_questions([text_only], POLICIES, seed=1))
