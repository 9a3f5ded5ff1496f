"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a small file that appears under its name only when it is whole, and on the disk.

    Args:
        path: of the file; its folder is made. What was there stays until the new one is whole.
        text: what it holds, written as UTF-8.

    Raises:
        OSError: it could not be written; the error names the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open(
                "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        # Writing into an open file says no name, and the hidden one tells nobody anything.
        raise OSError(error.errno, error.strerror, str(path)) from error
