from __future__ import annotations

import io

import pytest
from rich.console import Console

from vipllava.commands.output import print_table, progress_bars, rows_table


def table() -> None:
    headers = ("name", "seconds", "folder")
    rows = [("stage.learning_rate=0.001", "12", "runs/sweeps/rates/stage.learning_rate=0.001")]
    print_table(rows_table("loss", headers, rows, right=["seconds"], spare=["folder", "seconds"]))


def test_a_narrow_terminal_leaves_columns_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns, there, gone in [
        ("100", ["name", "seconds", "folder"], []),
        ("60", ["name", "seconds"], ["too narrow for: folder"]),
        ("30", ["name"], ["too narrow for: folder,", "seconds"]),
    ]:
        monkeypatch.setenv("COLUMNS", columns)
        table()
        shown = capsys.readouterr().out
        assert "stage.learning_rate=0.001" in shown
        header = next(line for line in shown.splitlines() if "name" in line)
        assert [word for word in ("name", "seconds", "folder") if word in header] == there
        assert all(text in shown for text in gone), shown
        assert max(map(len, shown.splitlines())) <= int(columns)


def test_a_pipe_gets_every_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table()
    assert "runs/sweeps/rates/stage.learning_rate=0.001" in capsys.readouterr().out


def test_bytes_and_counts() -> None:
    out = io.StringIO()
    with progress_bars(Console(file=out, force_terminal=True, width=120)) as bars:
        bars("a.zip", "bytes", 1_500_000, None)
        bars("a.zip", "bytes", 3_000_000, 3_000_000)
        bars("unpack", "files", 3, None)
        bars("unpack", "files", 7, 7)
    shown = out.getvalue()
    assert "a.zip" in shown
    assert "3.0 MB of 3.0 MB" in shown
    assert "7 of 7 files" in shown
