"""Small files that a kill or a power failure leaves whole: as they were, or as they are meant."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any, cast

import yaml

logger = logging.getLogger(__name__)


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
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        # Writing into an open file says no name, and the hidden one tells nobody anything.
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_yaml(path: Path, values: Any) -> None:
    """Write plain values as :func:`write_whole` does."""
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def read_text(path: Path) -> str | None:
    """Return what a small file says, without white space around it.

    Returns:
        None if the file is absent; also if it is empty or unreadable, which the log says.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return _absent(path, error)
    # A file whose blocks never reached the disk may be zeros.
    return text if text.strip("\0") else _absent(path, "it is empty")


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file; None as :func:`read_text`, and if it holds anything else."""
    text = read_text(path)
    if text is None:
        return None
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return _absent(path, " ".join(str(error).split()))
    if not isinstance(values, dict):
        return _absent(path, "it holds no mapping")
    return cast("dict[str, Any]", values)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk where the system can."""
    with contextlib.suppress(OSError):  # some file systems sync no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk, as before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _absent(path: Path, reason: object) -> None:
    logger.warning("%s cannot be read (%s): it counts as absent", path, reason)
