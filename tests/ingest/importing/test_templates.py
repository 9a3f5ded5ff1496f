"""Questions and answers with placeholders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ingest.importing.exports import coco, put_json, put_pictures
from tests.ingest.importing.importing import imported, refused
from vipllava.ingest.importing.source import ImportingError
from vipllava.ingest.importing.templates import Templates


@pytest.fixture
def source(tmp_path: Path) -> Path:
    put_pictures(tmp_path / "there")
    return put_json(tmp_path / "there" / "instances.json", coco())


def said(record: dict) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def test_questions_take_turns(tmp_path: Path, source: Path):
    questions = ("What is {region}?", "Name {region}, of {supercategory}.")
    _, records = imported(tmp_path, "coco", source, question=questions, answer="A {category}.")
    assert said(records[0]) == [
        "<image>\nWhat is <bbox0>?", "A cup.", "Name <bbox1>, of kitchen.", "A fork.",
    ]  # fmt: skip
    assert said(records[1]) == ["<image>\nWhat is <bbox0>?", "A cup."]


def test_an_answer_may_name_the_region(tmp_path: Path, source: Path):
    _, records = imported(
        tmp_path,
        "coco",
        source,
        question=("Where is the {category}? {{exactly}}",),
        answer="{region}",
    )
    assert said(records[0])[:2] == ["<image>\nWhere is the cup? {exactly}", "<bbox0>"]


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (
            "What is {regoin}?",
            "{category}",
            "there is no {regoin} here, but {region}, {category}, ",
        ),
        ("What is {region}?", "{colour}", "there is no {colour} here"),
        ("What is it?", "{category}", "which does not say which region is meant"),
        ("What is {region", "x", "expected '}' before end of string"),
        ("What is {}?", "x", "`{}` names nothing"),
        ("What is {region!r}?", "x", "`{region}` names nothing"),
        ("What is {category.upper}?", "x", "`{category.upper}` names nothing"),
        ("What is <bbox0>?", "x", "a region is written {region}"),
        ("<image> What is {region}?", "x", "the picture comes with the first question"),
        (" ", "x", "question is empty"),
        ("What is {region}?", "", "answer is empty"),
    ],
)
def test_templates_that_are_none(
    tmp_path: Path, source: Path, question: str, answer: str, message: str
):
    with pytest.raises(ImportingError) as caught:
        imported(tmp_path, "coco", source, question=(question,), answer=answer)
    assert message in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_alone_a_region_need_not_be_named(tmp_path: Path, source: Path):
    _, records = imported(tmp_path, "coco", source, question=("What is marked?",), max_regions=1)
    assert said(records[0]) == ["<image>\nWhat is marked?", "cup"]
    assert len(records) == 3


def test_what_a_template_needs_has_to_be_there(tmp_path: Path):
    given = coco()
    given["annotations"][0]["attributes"] = {"state": "full"}
    put_pictures(tmp_path / "there")
    source = put_json(tmp_path / "there" / "instances.json", given)
    why = refused(tmp_path, "coco", source, answer="{state}")
    assert "2 of 3 regions cannot be imported (attribute-missing 2)" in why
    assert "- instances.json, image 11, annotation 101: it has no state" in why


def test_categories_that_texts_of_records_would_misread(tmp_path: Path):
    given = coco()
    given["categories"][0]["name"] = "<image>"
    put_pictures(tmp_path / "there")
    source = put_json(tmp_path / "there" / "instances.json", given)
    assert "its category is '<image>', which texts of records use" in refused(
        tmp_path, "coco", source
    )


def test_templates_are_values():
    assert Templates().placeholders == {"region", "category"}
    assert Templates().fill(0, 4, {"category": "cup"}) == ("What is <bbox4>?", "cup")


def test_half_of_a_character_is_no_text(tmp_path: Path):
    given = coco()
    given["categories"][0]["name"] = "cup \ud83d"
    put_pictures(tmp_path / "there")
    source = put_json(tmp_path / "there" / "instances.json", given)
    why = refused(tmp_path, "coco", source)
    assert "its category has half of a character, a lone surrogate" in why
