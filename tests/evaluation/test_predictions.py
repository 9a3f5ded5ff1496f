"""The files of an evaluation that others read: what they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vipllava.evaluation.predictions import ScoredItem, read_evaluation, read_predictions
from vipllava.types import VipLlavaError

LINE = {
    "key": "a", "image": "1.jpg", "score": 0.5, "answer": "cup", "ground_truth": ["a cup", "cup"],
    "groups": ["rec"],
}  # fmt: skip


def file(folder: Path, *lines: object) -> Path:
    path = folder / "predictions.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_what_is_written_is_read(tmp_path: Path):
    items = [
        ScoredItem("a", "1.jpg", 0.5, "é\u2028cup", ["a cup", "cup"], ("rec", "ocr")),
        ScoredItem("b", "1.jpg", None, None, "star"),
    ]
    path = tmp_path / "predictions.jsonl"
    text = items[0].line(question="What?", letter_score=1) + items[1].line(letter_score=0)
    path.write_text(text, encoding="utf-8")
    assert text.splitlines()[-1] == (
        '{"key": "b", "image": "1.jpg", "score": null, "answer": null, "ground_truth": "star", '
        '"groups": [], "letter_score": 0}'
    )
    assert list(read_predictions(path).values()) == items
    assert [item.score for item in read_predictions(path, "letter_score").values()] == [1, 0]


def test_a_score_that_is_no_number_is_not_written():
    with pytest.raises(ValueError, match="Out of range float values"):
        ScoredItem("a", "1.jpg", float("nan"), "cup", "cup").line()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "a", "marked": "cup"}, r"has no image, score, answer, .*; it has key, marked"),
        (LINE | {"score": True}, "score is True; expected a number or null"),
        (LINE | {"score": "1"}, "score is '1'; expected a number or null"),
        ('{"key": "a", "image": "1", "score": NaN, "answer": "", "ground_truth": 1, "groups": []}',
         "score is nan; expected a number or null"),
        (LINE | {"key": 3}, "key is 3; expected a text"),
        (LINE | {"image": ""}, "image is ''; expected a text"),
        (LINE | {"answer": 3}, "answer is 3; expected a text or null"),
        (LINE | {"groups": "rec"}, "groups is 'rec'; expected a list of texts"),
        ("[]", "not an object"),
        ('{"key": "a", "ima', "Unterminated string"),
        (LINE | {"key": "first"}, "the key first occurs twice"),
    ],
)  # fmt: skip
def test_what_breaks_the_schema_is_named_by_line(line, message: str, tmp_path: Path):
    path = file(tmp_path, LINE | {"key": "first"}, line)
    with pytest.raises(VipLlavaError, match=f"1 lines of (.|\n)*predictions.jsonl:2: {message}"):
        read_predictions(path)


def test_an_evaluation_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(VipLlavaError, match=r"there is no .*metrics.json: name the folder"):
        read_evaluation(tmp_path)
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"bench": "v7w", "settings": {"seed": 1, "judge": {"model": "m"}}}')
    with pytest.raises(VipLlavaError, match=r"there is no .*predictions.jsonl"):
        read_evaluation(tmp_path)
    file(tmp_path)
    with pytest.raises(VipLlavaError, match=r"predictions.jsonl has no items; evaluate again"):
        read_evaluation(tmp_path)
    file(tmp_path, LINE)
    assert read_evaluation(tmp_path).settings == {"seed": 1, "judge.model": "m"}
    with pytest.raises(VipLlavaError, match=r"has no cider; it has key, image, score"):
        read_evaluation(tmp_path, "cider")
    metrics.write_text('{"benchmark": "v7w"}')
    with pytest.raises(VipLlavaError, match=r"metrics.json has no `bench` .*earlier version"):
        read_evaluation(tmp_path)
    metrics.write_text("{")
    with pytest.raises(VipLlavaError, match=r"metrics.json is not JSON"):
        read_evaluation(tmp_path)
