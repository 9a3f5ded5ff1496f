"""Annotation lists: read in pieces, cut by position, and what can be wrong with them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.toy_data import said
from vipllava.ingest.building import annotations
from vipllava.ingest.building.annotations import (
    Annotation,
    AnnotationError,
    iter_annotations,
    iter_range,
    plan_ranges,
)

RECORDS: list[Any] = [
    {"id": "a", "text": 'brackets ] } , and "quotes" \\'},
    {"id": 1, "deep": [[1, 2], {"x": [None, True, 1.5e-3]}]},
    {"id": "ü", "text": "日本語 😀 \u2028"},
    {},
    {"id": "last", "n": 123456789},
]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def in_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(annotations, "_PIECE", size)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 16, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_any_piece_gives_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, ascii_only: bool, indent: int
):
    in_pieces(monkeypatch, piece)
    text = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=indent)
    path = write(tmp_path / "list.json", f" \n{text}\n ")
    items = list(iter_annotations(path))
    assert [item.record for item in items] == RECORDS
    assert [item.position for item in items] == [0, 1, 2, 3, 4]
    data = path.read_bytes()
    for item in items:
        assert data[item.start : item.start + len(item.text)] == item.text
        assert json.loads(item.text) == item.record


def test_lines(tmp_path: Path):
    path = write(tmp_path / "list.jsonl", '{"id": 1}\n\n  {"id": 2}  \r\n{"id": \n[1]\n{"id": 3}')
    items = list(iter_annotations(path))
    assert [(item.position, item.start, item.text) for item in items] == [
        (0, 0, b'{"id": 1}'),
        (1, 13, b'{"id": 2}'),
        (2, 26, b'{"id":'),
        (3, 34, b"[1]"),
        (4, 38, b'{"id": 3}'),
    ]
    assert [item.record for item in items] == [{"id": 1}, {"id": 2}, None, None, {"id": 3}]
    assert items[2].problem is not None
    assert items[2].problem.startswith("is not JSON")
    assert items[3].problem == "is list; a record is a JSON object"


@pytest.mark.parametrize("piece", [1, 4, 1 << 20])
def test_items_that_are_no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int):
    in_pieces(monkeypatch, piece)
    path = write(tmp_path / "list.json", '[{"a": 1}, 12345, "text", null, [{}], {"b": 2}]')
    items = list(iter_annotations(path))
    assert [item.text for item in items] == [
        b'{"a": 1}', b"12345", b'"text"', b"null", b"[{}]", b'{"b": 2}',
    ]  # fmt: skip
    assert [item.problem for item in items] == [
        None,
        "is int; a record is a JSON object",
        "is str; a record is a JSON object",
        "is NoneType; a record is a JSON object",
        "is list; a record is a JSON object",
        None,
    ]


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path):
    for name, text in (("x.json", '[{"id": 1}]'), ("x.jsonl", '{"id": 1}')):
        (item,) = iter_annotations(write(tmp_path / name, b"\xef\xbb\xbf" + text.encode()))
        assert item.record == {"id": 1}
        assert item.start == 3 + text.index("{")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_stretches_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, piece: int
):
    in_pieces(monkeypatch, piece)
    records = [{"id": n, "text": "é" * n} for n in range(11)]
    path = tmp_path / f"list.{suffix}"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write(path, f"[{', '.join(lines)}]" if suffix == "json" else "\n".join(lines))
    plan = plan_ranges(path, 4)
    assert (plan.num_records, plan.num_selected) == (11, 11)
    assert [(part.first, part.num_samples) for part in plan.ranges] == [(0, 4), (4, 4), (8, 3)]
    read = [[item.record for item in iter_range(path, part)] for part in plan.ranges]
    assert read == [records[:4], records[4:8], records[8:]]
    second = [item.position for item in iter_range(path, plan.ranges[1])]
    assert second == [4, 5, 6, 7]


def test_only_selected_records_count(tmp_path: Path):
    records: list[Any] = [{"id": n} for n in range(10)]
    records[4] = "broken"
    path = write(tmp_path / "list.json", json.dumps(records))

    def odd(record: Any) -> bool:
        return record["id"] % 2 == 1

    plan = plan_ranges(path, 2, select=odd)
    assert (plan.num_records, plan.num_selected) == (10, 6)
    read = [[item.position for item in iter_range(path, part, odd)] for part in plan.ranges]
    assert read == [[1, 3], [4, 5], [7, 9]]


def test_the_fingerprint_is_of_the_selected_records(tmp_path: Path):
    def digests(records: list[Any]) -> tuple[str, list[str]]:
        plan = plan_ranges(write(tmp_path / "list.json", json.dumps(records)), 2)
        return plan.digest, [part.digest for part in plan.ranges]

    one = digests([{"id": n} for n in range(4)])
    assert one == digests([{"id": n} for n in range(4)])
    other = digests([{"id": n} for n in (0, 1, 2, 9)])
    assert one[0] != other[0]
    assert [a == b for a, b in zip(one[1], other[1], strict=True)] == [True, False]


def test_a_list_that_changes_meanwhile(tmp_path: Path):
    path = write_lines(tmp_path / "list.jsonl", [{"id": n} for n in range(4)])
    part = plan_ranges(path, 2).ranges[1]
    write_lines(path, [{"id": n} for n in (0, 1, 3, 2)])
    with pytest.raises(AnnotationError, match=r"was changed while .* \(records from 2 on\)"):
        list(iter_range(path, part))


def test_progress_is_told(tmp_path: Path):
    path = write_lines(tmp_path / "list.jsonl", [{"id": n} for n in range(2500)])
    told: list[tuple[int, int]] = []
    plan_ranges(path, 1000, on_progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert len(told) == 3
    assert told[-1] == (size, size)
    assert [total for _, total in told] == [size] * 3


@pytest.mark.parametrize("piece", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty; expected a JSON list"),
        ("  \n", r"is empty; expected a JSON list"),
        ('{"a": [1]}', r"starts with `\{`; expected a JSON list .* \.jsonl"),
        ("[]", r"is an empty list"),
        ("[", r"record 0 \(byte 1\) is missing: the file breaks off"),
        ('[{"a": 1}', r"record 1 \(byte 9\) is missing: the file breaks off"),
        ('[{"a": 1},', r"record 1 \(byte 10\) is missing: the file breaks off"),
        ('[{"a": 1}, {"b": "tex', r"record 1 \(byte 11\) is not JSON \(Unterminated string"),
        ('[{"a": 1} {"b": 1}]', r"record 1 \(byte 10\) starts with `\{`"),
        ('[{"a": 1}, ]', r"record 1 \(byte 11\) is not JSON \(Expecting value"),
        ('[{"a": 1}, {b: 1}, {"c": 12345678901234567890}]', r"record 1 \(byte 11\) is not JSON"),
        ('[{"a": 1}] []', r"record 1 \(byte 11\) is followed by more than the end"),
        (b'[{"a": "\xff"}]', r"is not UTF-8 at byte 8"),
        ("[" + '{"a":' * 100_000, r"record 0 \(byte 1\) cannot be read"),
    ],
)
def test_what_is_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, text: str, message: str
):
    in_pieces(monkeypatch, piece)
    path = write(tmp_path / "list.json", text)
    with pytest.raises(AnnotationError, match=message) as caught:
        plan_ranges(path, 2)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "title", "name"),
    [
        ('{"info": {}, "images": [{"file_name": "a.jpg"}]}', "COCO", "coco"),
        ('{"version": "5.4.1", "shapes": [], "imagePath": "a.jpg"}', "LabelMe", "labelme"),
        ('[{"annotations": [{"result": []}], "data": {}}]', "Label Studio", "label-studio"),
        ('[{"annotator": 1, "annotation_id": 2}]', "Label Studio", "label-studio"),
        ("path: .\ntrain: images/train\nnames: [cup]\n", "YOLO", "yolo"),
    ],
)
def test_an_export_of_an_annotation_tool(tmp_path: Path, text: str, title: str, name: str):
    path = write(tmp_path / "list.json", text)
    with pytest.raises(AnnotationError) as caught:
        plan_ranges(path, 2)
    assert f"{path} is of {title}, and holds no records" in str(caught.value)
    assert f"`vipllava import {name} {path} --output DIR`" in str(caught.value)


def test_records_with_an_exports_fields(tmp_path: Path):
    record = {"annotator": 1, "annotation_id": 2, "conversations": said("Q?", "A.")}
    path = write(tmp_path / "list.json", json.dumps([record]))
    assert plan_ranges(path, 2).num_selected == 1


def test_a_missing_list(tmp_path: Path):
    with pytest.raises(AnnotationError, match=r"nowhere\.json cannot be read: No such file"):
        list(iter_annotations(tmp_path / "nowhere.json"))
    with pytest.raises(AnnotationError, match="cannot be read: No such file"):
        plan_ranges(tmp_path / "nowhere.json", 2)


def test_no_record_of_the_kinds(tmp_path: Path):
    path = write(tmp_path / "list.json", '[{"a": 1}]')
    with pytest.raises(AnnotationError, match="has no record of the data set's kinds"):
        plan_ranges(path, 2, select=lambda record: False)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_record_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    monkeypatch.setattr(annotations, "LONGEST_RECORD", 5000)
    in_pieces(monkeypatch, 100)
    text = '{"a": "' + "x" * 20_000
    path = write(tmp_path / f"list.{suffix}", "[" + text if suffix == "json" else text)
    with pytest.raises(AnnotationError, match=r"5000 bytes"):
        list(iter_annotations(path))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_list(tmp_path: Path, suffix: str):
    record = {"id": "x" * 20, "conversations": [{"from": "human", "value": "w" * 4000}] * 4}
    path = tmp_path / f"list.{suffix}"
    line = json.dumps(record)
    with path.open("w") as file:
        start, between, end = ("[", ",\n", "]") if suffix == "json" else ("", "\n", "\n")
        file.write(start + between.join([line] * 2000) + end)
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    try:
        plan = plan_ranges(path, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.num_records == 2000
    assert peak < 8e6


def test_an_annotation_is_a_value():
    item = Annotation(0, 0, b"{}", {})
    assert item == Annotation(0, 0, b"{}", {})
    assert item.problem is None


@pytest.mark.parametrize("depth", [63, 64, 900, 100_000])
def test_records_nested_without_end(tmp_path: Path, depth: int):
    deep = '{"id": "a", "x": ' + "[" * depth + "1" + "]" * depth + "}"
    good = json.dumps(RECORDS[0])
    first, last = iter_annotations(write(tmp_path / "list.jsonl", f"{deep}\n{good}\n"))
    assert (first.record is not None) == (depth == 63)
    assert first.problem is None or "64 levels" in first.problem or "recursion" in first.problem
    assert last.record == RECORDS[0]
    if depth < 100_000:
        items = list(iter_annotations(write(tmp_path / "list.json", f"[{deep}, {good}]")))
        assert [item.problem for item in items] == [first.problem, None]
        return
    with pytest.raises(AnnotationError, match=r"record 0 \(byte 1\) cannot be read .*correct it"):
        list(iter_annotations(write(tmp_path / "list.json", f"[{deep}, {good}]")))
