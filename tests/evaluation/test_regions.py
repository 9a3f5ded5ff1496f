"""The benchmark of any manifest's samples: marks kept and removed, exact scores, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.answering import Says, evaluated, grey_sample, is_plain
from tests.toy_data import lying_sample
from vipllava.evaluation.bench import Item
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.summary import score_table, summarise
from vipllava.types import DraftTurn, Request, Sample

BOTH = ("kept", "removed")


def item(key: str, answer: str) -> Item:
    return Item(f"toy/{key}", grey_sample(key, answer))


def look(request: Request) -> str:
    """Answer `star` if the image has a mark, else `cup`."""
    return "cup" if is_plain(request.image) else "Star"


def test_scores_are_exact(tmp_path: Path):
    items = [item(str(i), "star" if i < 3 else "cup") for i in range(4)]
    metrics = summarise(evaluated(REGIONS, items, look, tmp_path, BOTH))
    kept, removed = metrics["marks"]["kept"], metrics["marks"]["removed"]
    assert (kept["num_items"], kept["num_failures"], kept["score"]) == (4, 0, 0.75)
    assert (kept["low"], kept["high"], kept["num_images"]) == (0.25, 1.0, 4)
    assert removed["score"] == 0.25
    gap = metrics["faithfulness"]["gap"]
    assert (gap["score"], gap["num_items"]) == (0.5, 4)
    assert (metrics["faithfulness"]["left"], metrics["faithfulness"]["chance"]) == (0.25, 0.75)
    assert sum(group["num_items"] for group in kept["groups"].values()) == 4


def test_without_the_marks_nothing_is_drawn_and_the_words_stay(tmp_path: Path):
    model = Says(look)
    kept, removed = evaluated(REGIONS, [item("a", "star")], model, tmp_path, BOTH)
    assert [is_plain(request.image) for request in model.asked] == [False, True]
    assert kept.question == removed.question
    assert kept.groups == removed.groups
    assert kept.groups[0] in kept.question


def test_a_full_stop_is_a_mistake_and_right_in_the_lenient_figure_beside(tmp_path: Path):
    metrics = summarise(evaluated(REGIONS, [item("a", "star")], lambda _: "Star.", tmp_path))
    kept = metrics["marks"]["kept"]
    assert (kept["score"], kept["low"], kept["more"]["lenient"]["score"]) == (0, None, 1)
    assert kept["why_no_interval"] == "1 item of one image: one image shows no spread"
    assert score_table(REGIONS, metrics).total == ("all", "1", "0.0 (no interval)", "100.0")


def test_the_table_has_a_row_per_shape_and_a_column_per_marking(tmp_path: Path):
    items = [item(str(n), "star") for n in range(20)]
    table = score_table(REGIONS, summarise(evaluated(REGIONS, items, look, tmp_path, BOTH)))
    assert table.title == "regions: accuracy in % (95 %)"
    assert table.columns == ("", "items", "kept", "removed", "lenient")
    assert {"rectangle", "arrow"} & {row[0] for row in table.rows}
    all_right, all_wrong = "100.0 (83.9 to 100.0)", "0.0 (0.0 to 16.1)"
    assert table.total == ("all", "20", all_right, all_wrong, "100.0")
    assert table.notes == [
        "falls by 100.0 (no interval) points without the mark, to 0.0 %; chance is 100.0 %"
    ]


def test_items_of_one_image_are_drawn_together(tmp_path: Path):
    """Two images of two items, one right and one wrong: nothing between 0 and 1 is certain."""
    images = (grey_sample("a", "star").image, grey_sample("b", "cup").image)
    items = [
        Item(f"{name}/{n}", replace(grey_sample(f"{name}{n}", answer), image=image))
        for name, answer, image in zip("ab", ("star", "cup"), images, strict=True)
        for n in range(2)
    ]
    kept = summarise(evaluated(REGIONS, items, look, tmp_path))["marks"]["kept"]
    assert (kept["score"], kept["low"], kept["high"]) == (0.5, 0.0, 1.0)
    assert (kept["num_items"], kept["num_images"]) == (4, 2)


@pytest.mark.parametrize("upright", [True, False])
def test_published_images_are_asked_about_as_they_are_stored(upright: bool, tmp_path: Path):
    (_, _, image, _), size = lying_sample(upright)
    lying = replace(grey_sample("a", "star"), image=image, upright=upright)
    model = Says(lambda _: "star")
    evaluated(REGIONS, [Item("a", lying)], model, tmp_path)
    assert model.asked[0].image is not None
    assert model.asked[0].image.size == size


def test_images_are_held_as_the_model_gets_on(tmp_path: Path):
    drawn: list[int] = []

    def items():
        for number in range(40):
            drawn.append(number)
            yield item(str(number), "star")

    ahead: list[int] = []

    def say(request: Request) -> str:
        ahead.append(len(drawn))
        return "star"

    found = evaluated(REGIONS, items(), say, tmp_path)
    assert ahead == list(range(1, 41))
    assert [each.key for each in found] == [f"toy/{number}" for number in range(40)]


def test_the_file_of_predictions(tmp_path: Path):
    evaluated(REGIONS, [item("b", "é"), item("a", "star")], look, tmp_path, BOTH)
    rows = [
        json.loads(x) for x in (tmp_path / "predictions-removed.jsonl").read_text().split("\n")[:-1]
    ]
    assert list(rows[0]) == [
        "key", "image", "marks", "question", "answer", "ground_truth", "score", "groups", "failure",
    ]  # fmt: skip
    assert {row["key"]: (row["ground_truth"], row["answer"], row["marks"]) for row in rows} == {
        "toy/a": ("star", "cup", "removed"),
        "toy/b": ("é", "cup", "removed"),
    }


def test_what_asks_nothing_is_a_failure_of_its_own(tmp_path: Path):
    silent = Sample("t", "toy", None, (), (DraftTurn("assistant", ("hi",)),), "refcocog")
    broken = replace(grey_sample("p", "star"), image=b"no image")
    items = [Item("toy/t", silent), Item("toy/p", broken), item("a", "star")]
    found = evaluated(REGIONS, items, look, tmp_path)
    assert [each.key for each in found] == ["toy/t", "toy/p", "toy/a"]
    assert found[0].failure == "toy/t cannot be asked: it has no user's question and its answer"
    assert found[1].failure is not None
    assert found[1].failure.startswith("toy/p")
    assert [each.score for each in found] == [None, None, 1.0]
    kept = summarise(found)["marks"]["kept"]
    assert (kept["score"], kept["num_items"], kept["num_failures"]) == (1.0, 1, 2)
    assert list(kept["failures"]) == ["toy/t", "toy/p"]
