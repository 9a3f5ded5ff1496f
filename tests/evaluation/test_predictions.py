"""A line of ``predictions.jsonl``: what is written is read, and what breaks the schema refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vipllava.evaluation.bench import Prediction, jsonl
from vipllava.evaluation.journal import Journal, read_predictions
from vipllava.types import VipLlavaError

LINE = {
    "key": "a", "image": "1.jpg", "marks": "kept", "question": "What?", "answer": "cup",
    "ground_truth": ["a cup", "cup"], "score": 0.5, "groups": ["rec"], "failure": None,
}  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path):
    items = [
        Prediction(
            "a", "1.jpg", "kept", "What?", ["a cup", "cup"], ("rec", "ocr"), "é\u2028cup", 0.5
        ),
        Prediction("b", "1.jpg", "kept", "What?", "star", more={"lenient": 1}, failure="none"),
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text(text := jsonl(item.row() for item in items), encoding="utf-8")
    assert text.split("\n")[-2] == (
        '{"key": "b", "image": "1.jpg", "marks": "kept", "question": "What?", "answer": null, '
        '"ground_truth": "star", "score": null, "lenient": 1, "groups": [], "failure": "none"}'
    )
    assert list(read_predictions(path).values()) == items


def test_a_score_that_is_no_number_is_not_written():
    with pytest.raises(ValueError, match="Out of range float values"):
        jsonl([LINE | {"score": float("nan")}])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "a", "failure": "x"}, r"has no image, marks, .*, groups; it has key, failure"),
        (LINE | {"score": True}, r"has another kind of value in score \(True\)"),
        (LINE | {"score": "1", "key": ""}, r"in key \(''\), score \('1'\)"),
        (json.dumps(LINE).replace("0.5", "NaN"), r"in score \(nan\)"),
        (LINE | {"key": 3}, r"in key \(3\)"),
        (LINE | {"image": ""}, r"in image \(''\)"),
        (LINE | {"marks": "lost"}, r"in marks \('lost'\)"),
        (LINE | {"question": None}, r"in question \(None\)"),
        (LINE | {"answer": 3}, r"in answer \(3\)"),
        (LINE | {"groups": "rec"}, r"in groups \('rec'\)"),
        (LINE | {"groups": [1]}, r"in groups \(\[1\]\)"),
        (LINE | {"lenient": "yes"}, r"in lenient \('yes'\)"),
        ("[]", "is no object"),
        ("{", "Expecting property name"),
    ],
)
def test_what_breaks_the_schema_is_named_by_line(line: object, message: str, tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(LINE)}\n{text}\n")
    with pytest.raises(VipLlavaError, match=rf"predictions.jsonl:2: .*{message}.*restore the line"):
        read_predictions(path)


def test_a_torn_line_is_read_over_and_cut_off_by_who_writes_behind_it(tmp_path: Path):
    journal = Journal(tmp_path, {})
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(whole := jsonl([LINE]).encode())
    with path.open("ab") as file:
        file.write(b'{"key": "b", "ima')
    assert list(read_predictions(path)) == ["a"]
    assert path.stat().st_size > len(whole)
    journal.append(Prediction("c", "1.jpg", "kept", "What?", "star"))
    journal.close()
    assert list(read_predictions(path)) == ["a", "c"]
    assert path.read_bytes().startswith(whole + b'{"key": "c"')
