"""What becomes of marks, seen in the pixels and in the words; what several markings tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.answering import GREY, POLICIES, evaluated, grey_image, grey_sample
from tests.toy_data import encode_picture, make_manifest, said
from vipllava.evaluation.bench import ALL_MARKS, BenchData, Item, Marks, Moved, Prediction
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.marking import MarkedItem, items_of, mark_item
from vipllava.evaluation.summary import faithfulness, summarise
from vipllava.records.image_decode import decode_image
from vipllava.shards.tars import write_shards
from vipllava.types import DraftTurn, Mention, RecordError, Region, Request, Sample
from vipllava.visual_prompts.policies import POLICIES as PUBLISHED
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.shapes import PALETTE

SIZE = (64, 48)
RIGHT = Region((40.0, 8.0, 60.0, 40.0))


def item(number: int = 0) -> Item:
    sample = grey_sample(str(number), "star", (4, 8, 24, 40))
    return Item(f"toy/{number}", sample, moved=(Moved((RIGHT,), "cup"),))


def marked(marks: Marks, which: Item | None = None, seed: int = 1) -> MarkedItem:
    found = mark_item(which or item(), SIZE, POLICIES, seed, marks)
    assert found is not None
    return found


def pixels(found: MarkedItem) -> np.ndarray:
    image = render_plan(decode_image(grey_image(), "k"), found.plan)
    return np.array(image).astype(int)


@pytest.mark.parametrize("number", range(12))
def test_moved_marks_look_and_read_the_same_elsewhere(number: int):
    kept, moved = marked("kept", item(number)), marked("moved", item(number))
    assert kept.turns == moved.turns
    assert (kept.ground_truth, moved.ground_truth) == ("star", "cup")
    (before,), (after,) = kept.plan.prompts, moved.plan.prompts
    styles = [(p.shape, p.rgb, p.colour_name, p.alpha) for p in (before, after)]
    assert styles[0] == styles[1]
    assert moved.sample.regions == (RIGHT,)
    drawn = [np.argwhere((pixels(found) != GREY).any(axis=2)) for found in (kept, moved)]
    middles = [points[:, 1].mean() for points in drawn]
    assert middles[0] < 32 < middles[1] or before.shape == "arrow"


@pytest.mark.parametrize("number", range(12))
def test_recoloured_marks_keep_their_strokes_and_the_words_follow(number: int):
    kept, other = marked("kept", item(number)), marked("recoloured", item(number))
    (before,), (after,) = kept.plan.prompts, other.plan.prompts
    assert before.strokes == after.strokes
    assert before.rgb != after.rgb
    assert ((pixels(kept) != GREY) == (pixels(other) != GREY)).any(axis=2).all()
    if before.colour_name is None:
        assert kept.turns == other.turns
    else:
        assert after.colour_name is not None
        assert after.rgb == PALETTE[after.colour_name]
        assert kept.turns[0].text.replace(before.colour_name, after.colour_name) == (
            other.turns[0].text
        )


def test_recoloured_marks_stay_apart():
    boxes = [(10.0 * n, 5.0, 10.0 * n + 8, 40.0) for n in range(6)]
    parts = [part for n in range(6) for part in (" ", Mention(n))]
    turns = (DraftTurn("user", tuple(parts), True), DraftTurn("assistant", ("x",)))
    regions = tuple(map(Region, boxes))
    sample = Sample("k", "toy", grey_image(), regions, turns, "v7w")
    for seed in range(5):
        found = mark_item(Item("k", sample), SIZE, PUBLISHED["evaluation"], seed, "recoloured")
        assert found is not None
        assert len({prompt.colour_name for prompt in found.plan.prompts}) == 6


def test_a_mark_goes_only_where_another_answer_is_right():
    here = grey_sample("0", "star", (4, 8, 24, 40)).regions
    beside = grey_sample("0", "star", (5, 8, 25, 40)).regions  # the same object, boxed anew
    nowhere = (Moved((RIGHT,), "a Star "), Moved(here, "cup"), Moved(beside, "cup"))
    assert mark_item(replace(item(), moved=nowhere), SIZE, POLICIES, 1, "moved") is None
    assert marked("moved", replace(item(), moved=(*nowhere, *item().moved))).ground_truth == "cup"


LEFT = [[5, 5, 30, 40]]


def record(key: str, box: list[list[int]], answer: str, **more: Any) -> tuple:
    turns = said("<image>\nWhat is <bbox0>?", answer)
    given = {"id": key, "image": "x.jpg", "bboxes": box, "conversations": turns, **more}
    return key, given, encode_picture(), "jpg"


def test_places_are_those_of_the_record_or_of_the_same_question_elsewhere(tmp_path: Path):
    right = [[35, 5, 60, 40]]
    others = [{"bboxes": right, "conversations": said("<image>\nWhat is <bbox0>?", "fish")}]
    records = [
        record("a", LEFT, "star"),
        record("b", right, "cup"),
        record("c", LEFT, "star", others=others),
        ("d", record("d", right, "dog")[1], encode_picture(seed=5), "jpg"),
    ]
    write_shards(records, tmp_path / "toy")
    data = BenchData(make_manifest(), tmp_path, POLICIES, marks=("kept", "moved"))
    places = {
        found.key: [(m.ground_truth, m.regions[0].bbox_xyxy[0]) for m in found.moved]
        for found in items_of(data)
    }
    assert places == {
        "toy/a": [("cup", 35), ("star", 5)],
        "toy/b": [("star", 5), ("star", 5)],
        "toy/c": [("fish", 35)],
        "toy/d": [],
    }
    assert [found.moved for found in items_of(replace(data, marks=("kept",)))] == [()] * 4
    write_shards([record("a", LEFT, "star", others="b")], tmp_path / "bad")
    bad = BenchData(make_manifest("bad"), tmp_path, POLICIES, marks=("moved",))
    with pytest.raises(RecordError, match="bad/a: field `others` is b; expected a list of objects"):
        list(items_of(bad))
    asks = [{"bboxes": right, "conversations": said("<image>\nWhat colour is <bbox0>?", "red")}]
    write_shards([record("a", LEFT, "star", others=asks)], tmp_path / "other")
    other = BenchData(make_manifest("other"), tmp_path, POLICIES, marks=("moved",))
    with pytest.raises(RecordError, match="other/a: one of `others` asks something else; give its"):
        list(items_of(other))


def test_a_place_may_have_an_answer_that_mentions_a_mark(tmp_path: Path):
    boxes = [[5, 5, 30, 40], [35, 5, 60, 20]]

    def conversation(mark: int) -> Any:
        return said("<image>\nWhich is larger, <bbox0> or <bbox1>?", f"<bbox{mark}>")

    others = [{"bboxes": boxes[::-1], "conversations": conversation(1)}]
    given = {"id": "a", "image": "x.jpg", "bboxes": boxes, "conversations": conversation(0)}
    write_shards([("a", {**given, "others": others}, encode_picture(), "jpg")], tmp_path / "toy")
    (found,) = items_of(BenchData(make_manifest(), tmp_path, POLICIES, marks=("moved",)))
    (place,) = found.moved
    assert place.ground_truth == DraftTurn("assistant", (Mention(1),))


def test_what_a_model_that_reads_marks_does_and_one_that_never_looks(tmp_path: Path):
    def read(request: Request) -> str:
        assert request.image is not None
        columns = np.argwhere((np.array(request.image) != GREY).any(axis=2))[:, 1]
        return "nothing" if not len(columns) else "star" if columns.mean() < 32 else "cup"

    policies = {"refcocog": replace(POLICIES["refcocog"], shapes=("rectangle", "ellipse"))}
    items = [item(number) for number in range(10)]
    found = evaluated(REGIONS, items, read, tmp_path / "reads", ALL_MARKS, policies=policies)
    faithful = summarise(found)["faithfulness"]
    assert {name: faithful[name]["score"] for name in ("follows", "gap", "stays")} == {
        "follows": 1, "gap": 1, "stays": 1,
    }  # fmt: skip
    assert (faithful["left"], faithful["chance"]) == (0, 1)
    found = evaluated(REGIONS, items, lambda _: "star", tmp_path / "blind", ALL_MARKS)
    blind = summarise(found)["faithfulness"]
    assert (blind["follows"]["score"], blind["gap"]["score"], blind["left"]) == (0, 0, 1)


def test_faithfulness_counts_items_that_have_both_scores():
    def row(key: str, marks: Marks, score: float | None) -> Prediction:
        return Prediction(key, "i", marks, "?", "x", answer=marks, score=score)

    kept = [row(key, "kept", score) for key, score in zip("abcd", (1, 1, 0, None), strict=True)]
    moved = [row(key, "moved", score) for key, score in zip("abde", (1, 0, 1, 1), strict=True)]
    other = [row(key, "recoloured", score) for key, score in zip("abc", (1, 0, 1), strict=True)]
    found = faithfulness([*kept, *moved, *other])
    assert (found["follows"]["score"], found["follows"]["num_items"]) == (0.5, 2)
    assert (found["stays"]["score"], found["stays"]["num_items"]) == (0.5, 2)
    assert "gap" not in found
    # Who names every object says the same wherever the mark is.
    same = [replace(each, answer="a cup and a star") for each in (*kept, *moved)]
    assert faithfulness(same)["follows"]["score"] == 0
