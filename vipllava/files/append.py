"""JSON lines that processes append to while others read: a kill leaves all but the last line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from vipllava.files.locks import locked
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)


class AppendedLines:
    """A file of JSON objects, one a line, that any number of processes may append to.

    A line that a kill or a full disk has cut is passed over, with a warning, and the next one
    begins on a line of its own.

    Args:
        path: of the file, which need not exist; its lock is a hidden file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, whole before this returns; it may still be in the system's memory.

        Raises:
            OSError: it could not be written, e.g. for want of space.
        """
        # A half character, as in a cut emoji, becomes its JSON escape.
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        with (
            locked(lock, without="two processes that write at once may mix their lines"),
            self.path.open("a+b", buffering=0) as file,
        ):
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            while line:
                line = line[file.write(line) :]

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the whole lines since the last call, whoever wrote them.

        Raises:
            VipLlavaError: the file has lines, and none of them is a JSON object.
        """
        start = self._read_to
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        lines = [line for line in whole.split(b"\n") if line.strip()]
        rows = [row for line in lines if (row := _read_object(line)) is not None]
        if num_cut := len(lines) - len(rows):
            if not rows and start == 0:
                raise VipLlavaError(
                    f"{self.path} holds no JSON lines; name another file, or delete it"
                )
            logger.warning("%s: passed over %d lines that are cut or damaged", self.path, num_cut)
        return rows


def _read_object(line: bytes) -> dict[str, Any] | None:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
