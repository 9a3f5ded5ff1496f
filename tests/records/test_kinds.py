"""Each record kind on a literal record; wordings vary, what they say does not."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import pytest

from tests.toy_data import encode_picture, said
from vipllava.keyed_random import generator_for
from vipllava.records import KINDS, kind_of, parse_record
from vipllava.types import DraftTurn, FixedVisualPrompt, Mention, Region, Sample

BOX, BOX2 = [5, 5, 30, 40], [20, 10, 60, 40]
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
IMAGE = encode_picture()

MARKED = {"bboxes": [BOX], "segmentations": [[SQUARE]]}
RECORDS: dict[str, dict[str, Any]] = {
    "image_level": {"id": "000001", "image": "a.jpg", "conversations": said("Hi <image>", "Yes")},
    "text_only": {"id": "x", "conversations": said("Hi", "Yes")},
    "refcocog": {"id": "refcocog-1", **MARKED, "answer": "a red cup"},
    "refcocog-gpt4v": {
        "id": "refcocog-gpt4v-1",
        **MARKED,
        "conversations": said("Who is <bbox>?", "The man <bbox>."),
    },
    "vg_rel": {"id": "vg_rel-1", "bboxes": [BOX, BOX2], "answer": "man, riding, horse"},
    "vg_rel-gpt4v": {
        "id": "vg_rel-gpt4v-1",
        "bboxes": [BOX, BOX2],
        "conversations": said("<image>\nIs <bbox1> near <bbox0>?", "Yes"),
    },
    "flickr30k": {
        "id": "flickr30k-1",
        "bbox": [[BOX, BOX2], [BOX2]],
        "grounding": "two men <bbox0> hold a rope <bbox1> .",
    },
    "vcr": {
        "id": "vcr-1",
        "meta": {
            "boxes": [[*BOX, 0.9], [*BOX2, 0.8], [0, 0, 9, 9, 0.7]],
            "segms": [[[[5, 5], [30, 5], [30, 40], [5, 40]]], [[[1, 1], [2, 2], [3, 3]]], []],
        },
        "class_names": ["person", "dog", "cup"],
        "question": ["Why", "is", [0], "looking", "at", [0, 1], "?"],
        "answer_choices": [["no"], [[1], "barks", "."], ["so"], ["it"]],
        "answer_label": 1,
        "rationale_choices": [["a"], ["b"], ["c"], [[0], "smiles"]],
        "rationale_label": 3,
    },
    "v7w": {
        "id": "v7w-1",
        "bboxes": [BOX, BOX2, [0, 0, 9, 9], [1, 2, 30, 20]],
        "question": "Which is a dog?",
        "answer": [0, 0, 9, 9],
    },
    "pointQA_twice": {
        "id": "pointQA_twice-1",
        "bboxes": [BOX],
        "general_question": "How many of these are there?",
        "answer": 2,
    },
    "regions": {
        "id": 7,
        **MARKED,
        "visual_prompts": [{"shape": "arrow", "colour": "red", "width": 3, "alpha": 200}],
        "conversations": said("<image>\nWhat is <bbox0>?", "a cup"),
    },
}


def parse(kind: str, draw: int = 0, **changes: Any) -> Sample:
    record = {**copy.deepcopy(RECORDS[kind]), **changes}
    image = None if kind == "text_only" else IMAGE
    rng = generator_for("test", draw)
    return parse_record(record, key="k", dataset="d", image=image, kind="auto", rng=rng)


def spoken(turn: DraftTurn) -> str:
    """Return the turn with mentions as ``<N>``."""
    return "".join(p if isinstance(p, str) else f"<{p.region}>" for p in turn.parts)


def conversations(kind: str, draws: int = 60) -> list[tuple[str, ...]]:
    return [tuple(map(spoken, parse(kind, draw).turns)) for draw in range(draws)]


@pytest.mark.parametrize("kind", RECORDS)
def test_kind_policy_and_picture(kind: str) -> None:
    assert kind_of(RECORDS[kind]) == kind
    sample = parse(kind)
    assert sample.policy == KINDS[kind].policy
    assert [turn.has_image for turn in sample.turns].count(True) == (kind != "text_only")
    assert [turn.role for turn in sample.turns[:2]] == ["user", "assistant"]


@pytest.mark.parametrize("kind", RECORDS)
def test_the_record_is_never_changed_and_the_generator_decides(kind: str) -> None:
    record = copy.deepcopy(RECORDS[kind])
    image = None if kind == "text_only" else IMAGE
    first, second = (
        parse_record(record, key="k", dataset="d", image=image, rng=generator_for("g", 1))
        for _ in range(2)
    )
    assert record == RECORDS[kind]
    assert first == second


def test_every_kind_is_covered() -> None:
    assert set(RECORDS) == set(KINDS)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"id": 12, "image": "a.jpg"}, "image_level"),
        ({"id": "refcoco-1", "image": "a.jpg"}, "image_level"),
        ({"id": "vcr-gpt4v-1"}, "vcr"),
        ({"id": "refcocog-other-gpt4v"}, "refcocog"),
        ({"id": "mine", "bboxes": [[1, 2, 3, 4]]}, "regions"),
        ({"id": "mine", "bbox": [[1, 2, 3, 4]]}, "regions"),
        ({"id": "flickr30k-1", "bbox": [[[1, 2, 3, 4]]]}, "flickr30k"),
        ({"id": "mine", "image": "a.jpg", "bboxes": []}, "image_level"),
        ({"id": "mine", "image": "a.jpg", "bboxes": None, "bbox": None}, "image_level"),
        ({"id": "mine", "image": None, "bboxes": []}, "text_only"),
        ({}, "text_only"),
    ],
)
def test_kinds_by_id(record: dict[str, Any], kind: str) -> None:
    assert kind_of(record) == kind


# Image-level and text-only.


@pytest.mark.parametrize(
    ("texts", "expected", "at"),
    [
        (("<image>\nHi", "a"), ("Hi", "a"), 0),
        (("Hi\n<image>", "a"), ("Hi", "a"), 0),
        (("a <image> b", "c"), ("a  b", "c"), 0),
        (("<image>", "a"), ("", "a"), 0),
        (("Hi", "a"), ("Hi", "a"), 0),
        (("Hi", "a", "<image>\nSo?", "b"), ("Hi", "a", "So?", "b"), 2),
    ],
)
def test_the_picture_moves_to_the_front(
    texts: tuple[str, ...], expected: tuple[str, ...], at: int
) -> None:
    turns = parse("image_level", conversations=said(*texts)).turns
    assert tuple(map(spoken, turns)) == expected
    assert [n for n, turn in enumerate(turns) if turn.has_image] == [at]


def test_text_only_keeps_what_was_typed() -> None:
    turns = parse("text_only", conversations=said(" an <image> tag, <bbox0> ", "yes ")).turns
    assert [spoken(turn) for turn in turns] == [" an <image> tag, <bbox0> ", "yes "]
    assert not any(turn.has_image for turn in turns)


def test_what_carries_nothing_to_learn_is_left_out() -> None:
    items = [{"from": "gpt", "value": "early"}, *said("q", "a", "open question")]
    assert [spoken(t) for t in parse("text_only", conversations=items).turns] == ["q", "a"]


# Region kinds.


def test_refcocog() -> None:
    sample = parse("refcocog")
    polygon = ((10.0, 10.0), (30.0, 10.0), (30.0, 30.0), (10.0, 30.0))
    assert sample.regions == (Region((5, 5, 30, 40), (polygon,)),)
    talks = conversations("refcocog", 400)
    assert {answer for _, answer in talks} == {"a red cup"}
    generic = [question for question, _ in talks if "<0>" not in question]
    assert 70 <= len(generic) <= 130  # a quarter
    assert len({question for question, _ in talks}) >= 8
    assert all("phrase" in question or "region" in question for question, _ in talks)


def test_refcocog_gpt4v() -> None:
    assert conversations("refcocog-gpt4v", 1) == [("Who is <0>?", "The man <0>.")]


def test_vg_rel() -> None:
    talks = conversations("vg_rel")
    assert {answer for _, answer in talks} == {"man, riding, horse"}
    assert all(q.index("subject <0>") < q.index("object <1>") for q, _ in talks)
    assert all("(subject, relation, object)" in question for question, _ in talks)
    assert len({question for question, _ in talks}) == 5


def test_vg_rel_gpt4v() -> None:
    assert conversations("vg_rel-gpt4v", 1) == [("Is <1> near <0>?", "Yes")]


def test_flickr30k() -> None:
    sample = parse("flickr30k")
    assert [region.style_of for region in sample.regions] == [None, 0, None]
    assert sample.regions[1].bbox_xyxy == sample.regions[2].bbox_xyxy == (20, 10, 60, 40)
    talks = conversations("flickr30k", 400)
    answers = [answer for _, answer in talks]
    plain, marked = "Two men hold a rope.", "Two men <0> hold a rope <2>."
    assert set(answers) == {plain, marked}
    assert 160 <= answers.count(plain) <= 240
    hinted = [question for question, _ in talks if "<0> and <2>" in question]
    assert 160 <= len(hinted) <= 240
    assert {"mark" in q for q, _ in talks} == {True}
    for question, answer in talks:  # the question says whether marks are to be named
        asks = any(p in question for p in ("with its mark", "which mark", "how each"))
        assert asks == (answer == marked)


def test_flickr30k_names_a_phrase_twice() -> None:
    sample = parse("flickr30k", grounding="A man <bbox0> , he <bbox0> sings", bbox=[[BOX]])
    assert len(sample.regions) == 1
    assert spoken(sample.turns[1]) in {"A man, he sings.", "A man <0>, he <0> sings."}


def test_vcr() -> None:
    sample = parse("vcr")
    # The third object is never mentioned; the second one's only ring is too short.
    square = ((5.0, 5.0), (30.0, 5.0), (30.0, 40.0), (5.0, 40.0))
    assert sample.regions == (
        Region((5, 5, 30, 40), (square,)),
        Region((20, 10, 60, 40)),
    )
    talks = conversations("vcr", 300)
    assert all(len(talk) == 4 for talk in talks)
    nouns: set[str] = set()
    answers: Counter[str] = Counter()
    choices = [0, 0]
    for question, answer, why, reason in talks:
        start = question.index("Why is the ")
        words = question[start:].split("?")[0].split(" ")
        nouns.add(words[3])
        assert words[4:7] == ["<0>", "looking", "at"]
        assert words[9:12] == ["<0>", "and", "the"]
        assert words[13] == "<1>"
        if "(A)" in question:
            choices[0] += 1
            assert "(A) no (B) The " in question
            assert "<1> barks. (C) so (D) it" in question
            answers[re.sub("The (dog|object|instance) <1> barks.", "*", answer)] += 1
        else:
            assert re.fullmatch("The (dog|object|instance) <1> barks.", answer)
        if "(D) The" in why:
            choices[1] += 1
        else:
            assert re.fullmatch("The (person|object|instance) <0> smiles", reason)
    assert nouns == {"person", "object", "instance"}
    assert all(110 <= count <= 190 for count in choices)
    letter = {"(B)", "B", "The answer is (B).", "Option (B) is right."}
    both = {"(B) *", "B. *", "B: *", "The answer is (B) *", "Option (B) is right: *"}
    assert set(answers) == letter | both
    alone = sum(answers[form] for form in letter) / answers.total()
    assert 0.2 < alone < 0.37  # 4 of 14


def test_only_a_leading_the_of_vcr_changes_case() -> None:
    choices = [["the", "end", "."], ["they", "know"], ["is", "the", "end"], [[0], "ends"]]
    for draw in range(40):
        turns = parse("vcr", draw, answer_choices=choices, question=["the", "end", "?"]).turns
        question, answer = map(spoken, turns[:2])
        assert "The end?" in question
        assert "They" not in question + answer
        if "(A)" in question:
            assert "(A) The end. (B) they know (C) is the end (D) The " in question


def test_vcr_reads_boxes_in_the_record_itself() -> None:
    meta = RECORDS["vcr"]["meta"]
    record = {k: v for k, v in RECORDS["vcr"].items() if k != "meta"} | meta
    rng = generator_for("test", 0)
    sample = parse_record(record, key="k", dataset="d", image=IMAGE, rng=rng)
    assert sample.regions == parse("vcr").regions


def test_v7w() -> None:
    assert conversations("v7w", 1) == [
        (
            "Which is a dog?\nA. The object <0>\nB. The object <1>\nC. The object <2>\n"
            "D. The object <3>\nAnswer with the option's letter from the given choices directly.",
            "C",
        )
    ]


def test_v7w_takes_the_first_of_equal_boxes() -> None:
    for answer, letter in ((BOX2, "A"), ([1, 2, 30, 20], "D")):
        sample = parse("v7w", bboxes=[BOX2, BOX2, BOX, [1, 2, 30, 20]], answer=answer)
        assert spoken(sample.turns[1]) == letter


@pytest.mark.parametrize("empty", [[10, 10, 10, 40], [9, 9, 9, 9], [0, 0, 0, 48], [64, 0, 64, 48]])
def test_v7w_asks_about_boxes_without_area(empty: list[int]) -> None:
    sample = parse("v7w", bboxes=[BOX, BOX2, [0, 0, 9, 9], empty], answer=empty)
    assert spoken(sample.turns[1]) == "D"
    assert sample.regions[3].bbox_xyxy == tuple(empty)


def test_pointqa_twice() -> None:
    assert conversations("pointQA_twice", 1) == [
        (
            "How many of these are there? The exemplary object is <0>.\n"
            "Answer the question using a single word or phrase.",
            "2",
        )
    ]


def test_users_regions() -> None:
    sample = parse("regions")
    assert sample.fixed == (FixedVisualPrompt("arrow", "red", 3, 200),)
    assert sample.turns[0] == DraftTurn("user", ("What is ", Mention(0), "?"), has_image=True)
    two = parse(
        "regions",
        bboxes=[BOX, BOX2],
        segmentations=[None, [SQUARE]],
        visual_prompts=[None, {"colour": [1, 2, 3]}],
    )
    assert two.fixed == (FixedVisualPrompt(), FixedVisualPrompt(colour=(1, 2, 3)))
    assert [len(region.polygons) for region in two.regions] == [0, 1]
    plain = parse("regions", segmentations=None, visual_prompts=None)
    assert (plain.fixed, plain.regions[0].polygons) == ((), ())


def test_users_boxes_may_be_called_bbox() -> None:
    record = {("bbox" if name == "bboxes" else name): v for name, v in RECORDS["regions"].items()}
    rng = generator_for("test", 0)
    sample = parse_record(record, key="k", dataset="d", image=IMAGE, rng=rng)
    assert sample == parse("regions")


def test_null_and_no_boxes_mean_absent() -> None:
    talk = said("Hi <image>", "Yes")
    plain = parse("image_level", conversations=talk)
    nothing = {"bboxes": [], "segmentations": None, "visual_prompts": []}
    assert parse("image_level", conversations=talk, **nothing) == plain
    assert parse("text_only", image=None, bboxes=None) == parse("text_only")
    boxes = {"bboxes": [BOX], "segmentations": [], "visual_prompts": []}
    assert parse("regions", **boxes).fixed == ()
