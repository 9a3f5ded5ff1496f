"""The region benchmark: marks drawn or not, exact scores, the files it writes."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vipllava.evaluation.benches import regions
from vipllava.types import DraftTurn, Mention, RecordError, Region, Sample
from vipllava.visual_prompts.policies import VisualPromptPolicy

POLICIES = {"refcocog": VisualPromptPolicy()}
GREY = (90, 90, 90)


def sample(key: str, answer: str) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), GREY).save(buffer, format="PNG")
    turns = (
        DraftTurn("user", ("What is ", Mention(0), "?"), has_image=True),
        DraftTurn("assistant", (answer,)),
    )
    return Sample(key, "toy", buffer.getvalue(), (Region((8, 8, 40, 40)),), turns, "refcocog")


class Looker:
    """Answers `star` if the picture has a mark, else `cup`."""

    def answer(self, requests, *, max_new_tokens=64, batch_size=16):
        return ["cup" if _is_plain(r.image) else "Star." for r in requests]


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


def test_scores_are_exact():
    samples = [sample(str(i), "star" if i < 3 else "cup") for i in range(4)]
    questions = regions.read_questions(samples, POLICIES, seed=1)
    predictions = regions.ask(questions, Looker())
    results = regions.score(predictions)
    assert results["num_questions"] == 4
    assert results["marked"]["correct"] == 3
    assert results["marked"]["accuracy"] == 0.75
    assert results["marked"]["low"] == pytest.approx(0.3006, abs=1e-4)
    assert results["unmarked"]["accuracy"] == 0.25
    assert results["gap"]["accuracy"] == 0.5
    assert sum(row["marked"]["total"] for row in results["by_shape"].values()) == 4


@pytest.mark.parametrize(
    ("draw_marks", "asked", "left_out"),
    [("true", "marked", "unmarked"), ("false", "unmarked", "marked")],
)
def test_one_half_alone(draw_marks, asked, left_out):
    questions = regions.read_questions([sample("a", "star")], POLICIES, seed=1)
    results = regions.score(regions.ask(questions, Looker(), draw_marks=draw_marks))
    assert results[asked]["total"] == 1
    assert results[left_out] is None
    assert results["gap"] is None


def test_pictures_are_held_a_few_batches_at_a_time():
    drawn = []

    def samples():
        for number in range(40):
            drawn.append(number)
            yield sample(str(number), "star")

    class Counter(Looker):
        most = 0

        def answer(self, requests, **settings):
            self.most = max(self.most, len(requests))
            return super().answer(requests)

    model = Counter()
    questions = regions.read_questions(samples(), POLICIES, seed=1)
    assert drawn == []
    predictions = regions.ask(questions, model, batch_size=1)
    assert model.most == 16
    assert [p.key for p in predictions] == [f"toy/{number}" for number in range(40)]
    assert {(p.marked, p.unmarked) for p in predictions} == {("Star.", "cup")}


def test_files_can_be_read_back(tmp_path):
    questions = regions.read_questions([sample("a", "star"), sample("b", "é")], POLICIES, seed=1)
    predictions = regions.ask(questions, Looker())
    regions.write_results(tmp_path, predictions, regions.score(predictions))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["key"], line["answer"], line["marked"], line["unmarked"]) for line in lines] == [
        ("toy/a", "star", "Star.", "cup"),
        ("toy/b", "é", "Star.", "cup"),
    ]
    assert json.loads((tmp_path / "results.json").read_text())["num_questions"] == 2


def test_records_that_ask_nothing_are_errors():
    text_only = Sample("t", "toy", None, (), (DraftTurn("user", ("hi",)),), "refcocog")
    with pytest.raises(RecordError, match="toy/t cannot be asked"):
        next(regions.read_questions([text_only], POLICIES, seed=1))
    with pytest.raises(RecordError, match="no questions"):
        regions.score([])
