"""Folders that weights are written to: what is there gives way only if it is of the same kind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vipllava.files.atomic import new_folder
from vipllava.types import CheckpointError


def check_replaceable(directory: Path, what: str, marks: Sequence[str]) -> None:
    """Raise CheckpointError if a folder is a file, or holds something else; as below."""
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file: name a folder to write")
    is_used = directory.is_dir() and any(directory.iterdir())
    if is_used and not any((directory / mark).is_file() for mark in marks):
        raise CheckpointError(
            f"{directory} exists and is no {what} (it has no {' or '.join(marks)}): choose another "
            "folder, or move it away"
        )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a config as transformers and peft do."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def checkpoint_folder(directory: Path, what: str, marks: Sequence[str]) -> Generator[Path]:
    """Have a folder filled beside its place, so that no half of one is ever found.

    Args:
        directory: to write to; what is there already is replaced if it is of the same kind.
        what: is written, for the message.
        marks: files by one of which an earlier one is known.

    Yields:
        The folder to fill.

    Raises:
        CheckpointError: the place is taken, or there is no room.
    """
    check_replaceable(directory, what, marks)
    try:
        with new_folder(directory, replace=True) as unfinished:
            yield unfinished
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written ({error}): free some space or choose another "
            "folder; nothing there was changed"
        ) from error
