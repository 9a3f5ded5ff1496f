"""JSON lines that are appended: whole lines only, whoever writes them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from vipllava.files.append import AppendedLines
from vipllava.types import VipLlavaError


def test_rows_come_back_once_and_those_of_others_too(tmp_path: Path):
    path = tmp_path / "new" / "rows.jsonl"
    lines = AppendedLines(path)
    assert lines.new_rows() == []
    rows = [{"text": "Bär\n\u2028 \ud83d"}, {"n": 1}]
    for row in rows:
        lines.append(row)
    assert lines.new_rows() == rows
    AppendedLines(path).append({"n": 2})
    assert lines.new_rows() == [{"n": 2}]
    assert lines.new_rows() == []
    assert AppendedLines(path).new_rows() == [*rows, {"n": 2}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_line_that_was_cut_is_passed_over_and_spoils_no_other(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "rows.jsonl"
    AppendedLines(path).append({"n": 1})
    AppendedLines(path).append({"n": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    lines = AppendedLines(path)
    assert lines.new_rows() == [{"n": 1}]
    lines.append({"n": 3})
    kept = [{"n": 2}] if cut == 1 else []  # only the end of the line was missing
    with caplog.at_level(logging.WARNING):
        assert lines.new_rows() == [*kept, {"n": 3}]
    assert [{"n": 1}, *kept, {"n": 3}] == AppendedLines(path).new_rows()
    assert ("passed over 1 lines" in caplog.text) is (cut not in (1, 9))


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n"')
    lines = AppendedLines(path)
    assert lines.new_rows() == [{"n": 1}]
    with path.open("ab") as file:
        file.write(b": 2}\n")
    assert lines.new_rows() == [{"n": 2}]


def test_many_write_at_once(tmp_path: Path):
    path = tmp_path / "rows.jsonl"

    def write(name: str) -> None:
        for number in range(25):
            AppendedLines(path).append({"row": f"{name}{number} " + name * 5000})

    threads = [threading.Thread(target=write, args=[name]) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [row["row"].split()[0] for row in AppendedLines(path).new_rows()]
    assert sorted(rows) == sorted(f"{name}{number}" for name in "abcd" for number in range(25))


def test_a_file_of_something_else_is_an_error(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("Buy milk.\n")
    with pytest.raises(VipLlavaError, match=r"notes\.txt holds no JSON lines"):
        AppendedLines(path).new_rows()
