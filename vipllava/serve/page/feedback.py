"""What people say about answers, as JSON lines that evaluation can read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vipllava import __version__
from vipllava.files.append import AppendedLines


class Feedback:
    """Votes, thumbs and flags, one line each.

    Args:
        path: of the file; None keeps nothing.
        conversations: whether every answered question is a line of its own, too.
    """

    def __init__(self, path: Path | None, conversations: bool = False) -> None:
        self.lines = None if path is None else AppendedLines(path)
        self.conversations = conversations

    def add(self, kind: str, facts: dict[str, Any]) -> None:
        """Write a line.

        Args:
            kind: ``vote``, ``up``, ``down``, ``flag`` or ``answer``.
            facts: see docs/use_page.md.

        Raises:
            OSError: it could not be written.
        """
        if self.lines is None or (kind == "answer" and not self.conversations):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.lines.append({"time": now, "kind": kind, "version": __version__, **facts})
