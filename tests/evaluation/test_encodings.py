"""How regions are told: literal words, drawn numbers, crops; what cannot be asked that way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.answering import POLICIES, grey_image, is_plain
from vipllava.evaluation.asking import Protocol, prepared
from vipllava.evaluation.bench import Item, Marks, Moved
from vipllava.evaluation.encodings import Coordinates, Encoding, check_encoding, encode_item
from vipllava.evaluation.marking import mark_item
from vipllava.records.image_decode import decode_image
from vipllava.types import ConfigError, DraftTurn, Mention, Region, Request, Sample
from vipllava.visual_prompts.rle import check_rle

BOTH: tuple[Marks, ...] = ("kept", "moved")
IMAGE = decode_image(grey_image(), "k")
REGIONS = (Region((4, 12, 20, 36)), Region((32, 0, 64, 48)))


def request(marks: Marks = "kept", **how) -> Request:
    turns = (
        DraftTurn("user", ("Is ", Mention(1), " left of ", Mention(0), "?"), has_image=True),
        DraftTurn("assistant", ("no",)),
    )
    sample = Sample("k", "toy", grey_image(), REGIONS, turns, "refcocog")
    item = Item("toy/k", sample, moved=(Moved(REGIONS[::-1], "yes"),))
    marked = mark_item(item, IMAGE.size, POLICIES, 1, marks)
    assert marked is not None
    return encode_item(IMAGE, marked, "toy/k", **how)


@pytest.mark.parametrize(
    ("convention", "text"),
    [
        (
            Coordinates(),
            "Is within the box [32, 0, 64, 48] left of within the box [4, 12, 20, 36]?",
        ),
        (
            Coordinates("unit"),
            "Is within the box [0.500, 0.000, 1.000, 1.000] left of within the box "
            "[0.062, 0.250, 0.312, 0.750]?",
        ),
        (
            Coordinates("thousand"),
            "Is within the box [500, 0, 1000, 1000] left of within the box [62, 250, 312, 750]?",
        ),
        (Coordinates(form="point"), "Is at the point (48, 24) left of at the point (12, 24)?"),
        (
            Coordinates("thousand", "point"),
            "Is at the point (750, 500) left of at the point (188, 500)?",
        ),
        (
            Coordinates(words="<box>({x1},{y1}),({x2},{y2})</box>"),
            "Is <box>(32,0),(64,48)</box> left of <box>(4,12),(20,36)</box>?",
        ),
    ],
)
def test_coordinates(convention: Coordinates, text: str):
    found = request(encoding="coordinates", coordinates=convention)
    assert found.turns[-1].text == text
    assert is_plain(found.image)


def test_moved_coordinates_are_the_other_regions():
    found = request("moved", encoding="coordinates", coordinates=Coordinates(form="point"))
    assert found.turns[-1].text == "Is at the point (12, 24) left of at the point (48, 24)?"


def test_numbers_are_drawn_in_the_middle_of_their_regions():
    found = request(encoding="set_of_mark")
    assert found.turns[-1].text == ("Is marked with the number 2 left of marked with the number 1?")
    rows, columns = np.argwhere((np.array(found.image) != 90).any(axis=2)).T
    assert abs(rows.mean() - 24) < 3
    left = columns < 26
    assert abs(columns[left].mean() - 12) < 3
    assert abs(columns[~left].mean() - 48) < 3
    removed = request("removed", encoding="set_of_mark")
    assert is_plain(removed.image)
    assert removed.turns == found.turns


def test_a_number_lies_on_the_mask_and_not_in_its_hole():
    mask = np.zeros((48, 64), bool)
    mask[:, 50:62] = True
    region = Region((4, 0, 62, 48), rle=check_rle(mask, "mask"))
    columns = {}
    for each in (region, Region(region.bbox_xyxy)):
        draft = (DraftTurn("user", ("What?",), has_image=True), DraftTurn("assistant", ("no",)))
        sample = Sample("k", "toy", grey_image(), (each,), draft, "refcocog")
        marked = mark_item(Item("toy/k", sample), IMAGE.size, POLICIES, 1, "kept")
        assert marked is not None
        found = encode_item(IMAGE, marked, "toy/k", encoding="set_of_mark")
        drawn = (np.array(found.image) != 90).any(axis=(0, 2))
        columns[each.rle is None] = np.flatnonzero(drawn).mean()
    assert abs(columns[True] - 33) < 2
    assert abs(columns[False] - 50) < 2


@pytest.mark.parametrize(
    ("encoding", "question", "kept", "moved"),
    [
        (
            "coordinates",
            "Which is larger, within the box [4, 12, 20, 36] or within the box [32, 0, 64, 48]?",
            "The one within the box [32, 0, 64, 48].",
            "The one within the box [32, 0, 64, 48].",
        ),
        (
            "set_of_mark",
            "Which is larger, marked with the number 1 or marked with the number 2?",
            "The one marked with the number 2.",
            "The one marked with the number 1.",
        ),
        (
            "crop",
            "Which is larger, shown in image 2 or shown in image 3?",
            "The one shown in image 3.",
            "The one shown in image 2.",
        ),
    ],
)
def test_an_answer_that_mentions_a_mark_is_told_as_its_question(
    encoding: Encoding, question: str, kept: str, moved: str
):
    item = which_is_larger()
    told = [row for row, _ in prepared(item, Protocol(POLICIES, 1, encoding=encoding), BOTH)]
    assert [row.ground_truth for row in told] == [kept, moved]
    assert told[0].question == question
    given = replace(item, ground_truth="the right one")
    (row, _), *_ = prepared(given, Protocol(POLICIES, 1, encoding=encoding), ("kept",))
    assert row.ground_truth == "the right one"


def test_drawn_marks_name_the_answer_as_the_question_does():
    """Moved marks keep their words: of the two in the question the answer has the other one."""
    never = {"refcocog": replace(POLICIES["refcocog"], article_rate=0.0)}
    kept, moved = (row for row, _ in prepared(which_is_larger(), Protocol(never, 1), BOTH))
    assert kept.question == moved.question
    first, second = kept.question.removeprefix("Which is larger, ").removesuffix("?").split(" or ")
    assert kept.ground_truth == f"The one {second}."
    assert moved.ground_truth == f"The one {first}."
    same = replace(which_is_larger(), moved=(Moved(REGIONS[::-1], the_one(1)),))
    assert len(list(prepared(same, Protocol(never, 1), BOTH))) == 1  # no other answer is right


def the_one(mark: int) -> DraftTurn:
    return DraftTurn("assistant", ("The one ", Mention(mark), "."))


def which_is_larger() -> Item:
    parts = ("Which is larger, ", Mention(0), " or ", Mention(1), "?")
    turns = (DraftTurn("user", parts, has_image=True), the_one(1))
    sample = Sample("k", "toy", grey_image(), REGIONS, turns, "refcocog")
    return Item("toy/k", sample, moved=(Moved(REGIONS[::-1], the_one(0)),))


def test_crops_stand_behind_the_image():
    found = request(encoding="crop")
    assert found.turns[-1].text == "Is shown in image 3 left of shown in image 2?"
    assert is_plain(found.image)
    assert [image.size for image in found.more_images] == [(16, 24), (32, 48)]


def test_the_overlay_is_resized_once_it_is_drawn():
    found = request(resize=(336, 336))
    assert found.image is not None
    assert found.image.size == (336, 336)
    assert not is_plain(found.image)


@pytest.mark.parametrize(
    ("encoding", "marks", "message"),
    [
        ("arrows", "kept", "encoding=arrows: expected one of overlay, coordinates, set_of_mark"),
        ("coordinates", "removed", "encoding=coordinates with marks=removed: .*takes kept, moved"),
        ("set_of_mark", "recoloured", "it takes kept, removed, moved"),
        (
            "crop",
            "kept",
            "encoding=crop shows a region as a second image, and this model",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(encoding: str, marks: Marks, message: str):
    with pytest.raises(ConfigError, match=message):
        check_encoding(encoding, [marks], several_images=False)
    if encoding == "crop":
        check_encoding(encoding, [marks], several_images=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": "percent"}, "coordinates.scale=percent: expected one of pixels, unit, thousand"),
        ({"form": "circle"}, "coordinates.form=circle: expected one of box, point"),
        ({"words": "at {x} {y}"}, r"coordinates.words=at \{x\} \{y\}: expected a wording with"),
        ({"words": "there"}, "expected a wording with the places {x1} {y1} {x2} {y2}"),
        ({"words": "{x1", "form": "point"}, "expected a wording with the places {x} {y}"),
    ],
)
def test_a_convention_that_tells_no_region_is_refused(given: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        Coordinates(**given)  # pyright: ignore[reportArgumentType]
