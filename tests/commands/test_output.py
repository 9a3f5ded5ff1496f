from __future__ import annotations

import io

from rich.console import Console

from vipllava.commands.output import progress_bars


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
