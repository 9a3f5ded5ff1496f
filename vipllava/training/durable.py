"""Small files that a kill or a power failure leaves whole: as they were, or as they are meant."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any, cast

import yaml

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, bring it to the disk, and rename it.

    Args:
        path: the file; one that is there is replaced, its folder has to exist.
        text: written as UTF-8, line ends as they are.

    Raises:
        OSError: it could not be written; what was there stays.
    """
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def write_yaml(path: Path, values: Any) -> None:
    """Write plain values as :func:`write_text` does."""
    write_text(path, yaml.safe_dump(values, sort_keys=False))


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


def _absent(path: Path, reason: object) -> None:
    logger.warning("%s cannot be read (%s): it counts as absent", path, reason)
