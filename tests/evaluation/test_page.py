"""From an evaluation to its page: the worst items, their images as asked, what has no score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.answering import POLICIES, Says, evaluated, grey_sample, is_plain
from vipllava.evaluation.asking import Protocol
from vipllava.evaluation.bench import Item, Marks, Moved, Prediction
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.page import images_as_asked, page_content, worst_keys
from vipllava.evaluation.summary import score_table, summarise
from vipllava.report.evaluation_page import EvaluationPage, write_evaluation_page
from vipllava.types import Failure, Region, Request

MARKS: tuple[Marks, ...] = ("kept", "removed", "moved")


def item(key: str, answer: str = "star", *, broken: bool = False) -> Item:
    sample = grey_sample(key, answer)
    moved = (Moved((Region((44, 4, 60, 20)),), "cup"),)
    return Item(f"toy/{key}", replace(sample, image=b"none") if broken else sample, moved=moved)


def prediction(key: str, score: float | None, marks: Marks = "kept") -> Prediction:
    failure = None if score is not None else "no verdict"
    return Prediction(key, "i", marks, "What?", "a", answer="b", score=score, failure=failure)


def test_the_worst_come_first_and_equal_ones_in_an_order_of_their_own():
    scores = {"a": 0.0, "b": 0.5, "c": 0.0, "d": None, "e": 1.0, "f": 0.0}
    found = [prediction(key, score) for key, score in scores.items()]
    others = [prediction("b", 0.0, "removed"), prediction("g", 0.0, "removed")]
    worst = worst_keys([*others, *found], 4)
    assert sorted(worst[:3]) == ["a", "c", "f"]
    assert worst[:3] != ["a", "c", "f"]  # but by their hashes
    assert worst[3] == "b"
    assert worst_keys([*reversed(found), *others], 4) == worst
    assert worst_keys(others, 4) == ["g", "b"]  # nothing was kept
    assert worst_keys([prediction("a", None)]) == []


def test_the_images_are_those_that_the_model_saw(tmp_path: Path):
    items = [item(str(number)) for number in range(4)]
    model = Says(lambda request: "star")
    evaluated(REGIONS, items, model, tmp_path, MARKS)
    shown = {(request.key, n % 3): request.image for n, request in enumerate(model.asked)}

    unread = iter(items)
    protocol = Protocol(POLICIES, 1, MARKS)
    images = images_as_asked(["toy/2", "toy/1"], unread, protocol)
    assert sorted(images) == [(f"toy/{key}", marks) for key in (1, 2) for marks in sorted(MARKS)]
    for (key, marks), (image,) in images.items():
        wanted = shown[key, MARKS.index(marks)]
        assert wanted is not None
        assert image.tobytes() == wanted.tobytes()
        assert is_plain(image) == (marks == "removed")
    assert [each.key for each in unread] == ["toy/3"]  # no more was read than needed


def say(request: Request) -> str | Failure:
    if request.key == "toy/2":
        return Failure("the server is gone")
    return "cup" if is_plain(request.image) or request.key == "toy/1" else "star"


def content(folder: Path, marks: tuple[Marks, ...] = MARKS) -> EvaluationPage:
    items = [item("0"), item("1"), item("2"), item("3", broken=True)]
    found = evaluated(REGIONS, items, say, folder, marks)
    metrics = {"bench": "regions", "metric": "accuracy", "settings": {"seed": 1}}
    metrics |= summarise(found) | {"published": []}
    table = score_table(REGIONS, metrics)
    return page_content(metrics, table, found, iter(items), Protocol(POLICIES, 1, marks), "go")


def test_what_the_page_of_a_small_evaluation_holds(tmp_path: Path):
    page = content(tmp_path)
    figures = [(each.name, each.value, each.num_items) for each in page.figures]
    assert figures == [
        ("kept", 50, 2), ("removed", 0, 2), ("moved", 50, 2), ("lenient", 50, 2),
    ]  # fmt: skip
    assert page.num_asked == 12
    assert [(key, marks) for key, marks, _ in page.failures] == [
        (f"toy/{key}", marks) for marks in MARKS for key in (2, 3)
    ]
    assert page.failures[0][2] == "the server is gone"
    assert "toy/3" in page.failures[1][2]  # the image that does not open
    assert [shown.key for shown in page.worst] == ["toy/1", "toy/0"]
    answers = page.worst[0].answers
    assert [(each.marks, each.ground_truth, each.answer, each.score) for each in answers] == [
        ("kept", "star", "cup", 0), ("removed", "star", "cup", 0), ("moved", "cup", "cup", 1),
    ]  # fmt: skip
    assert [len(each.images) for each in answers] == [1, 1, 1]
    assert page.versions["torch"]
    assert page.command == "go"

    write_evaluation_page(tmp_path / "report.html", page)
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/jpeg") == 6
    assert "6 of 12 questions" in text


def test_without_items_there_are_no_images(tmp_path: Path):
    found = [replace(prediction("toy/0", 0), ground_truth=["A", "B"], answer='["A", "C"]')]
    metrics = {"bench": "joint", "metric": "accuracy", "settings": {}, "published": []}
    metrics |= summarise(found)
    page = page_content(metrics, score_table(REGIONS, metrics), found)
    (shown,) = page.worst
    assert shown.answers[0].images == ()
    assert shown.answers[0].ground_truth == "A | B"
    write_evaluation_page(tmp_path / "report.html", page)
    assert "A | B" in (tmp_path / "report.html").read_text()


def test_an_evaluation_in_which_nothing_has_a_score(tmp_path: Path):
    found = [prediction(str(number), None) for number in range(3)]
    metrics = {"bench": "b", "metric": "accuracy", "settings": {}, "published": []}
    metrics |= summarise(found)
    page = page_content(metrics, score_table(REGIONS, metrics), found)
    assert (page.worst, len(page.failures)) == ([], 3)
    write_evaluation_page(tmp_path / "report.html", page)
    assert "3 of 3 questions" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("marks", [("kept",), ("removed",)])
def test_a_single_marking(tmp_path: Path, marks: tuple[Marks, ...]):
    page = content(tmp_path, marks)
    assert [each.marks for shown in page.worst for each in shown.answers] == [*marks * 2]
