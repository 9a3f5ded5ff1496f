"""Files and folders that a kill or a power failure leaves whole: as they were, or as meant.

Each is written beside its place, ``.NAME.TOKEN.unfinished``, and renamed when it is whole. This is
the only module that renames anything.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, cast

import yaml

logger = logging.getLogger(__name__)

UNFINISHED: Final = ".unfinished"
"""How the hidden name of everything that is not whole yet ends."""
_LOST: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = False) -> Generator[Path]:
    """Have a file written beside its place; it replaces what is there when the block ends well.

    Args:
        path: of the file; its folder is made.
        durable: bring it to the disk before it gets its name, which takes some milliseconds.

    Yields:
        The path to write to.
    """
    unfinished = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if durable:
            sync(unfinished)
        move(unfinished, path)
        if durable:
            sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Generator[Path]:
    """Have a folder filled beside its place; it is on the disk and named when the block ends well.

    Args:
        folder: its path; the folder that it lies in is made.
        replace: whether what is there goes then. Otherwise a folder that is not empty stays.

    Yields:
        The folder to fill.

    Raises:
        OSError: with ``ENOTEMPTY`` or ``EEXIST`` where another folder stays.
    """
    unfinished = _beside(folder)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        put_folder(unfinished, folder, replace=replace)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def put_folder(unfinished: Path, folder: Path, *, replace: bool = False) -> None:
    """Give a folder its name as :func:`new_folder` does; what was there is back if that fails."""
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    before = _beside(folder)
    if replace and folder.exists():
        move(folder, before)
    try:
        move(unfinished, folder)
    except OSError:
        if before.exists():
            move(before, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def move(source: Path, target: Path) -> Path:
    """Give a file or folder another name on its file system, which is returned; replaces a file."""
    return source.replace(target)


def free_path(path: str, first: int) -> Path:
    """Return the path with the first number behind it that is free."""
    paths = (Path(f"{path}{number}") for number in itertools.count(first))
    return next(path for path in paths if not path.exists())


def remove(path: Path) -> None:
    """Remove a file or folder; a folder loses its name first, so that no half of one is found."""
    if path.is_dir():
        hidden = path.name.endswith(UNFINISHED)
        shutil.rmtree(path if hidden else move(path, _beside(path)))
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a small UTF-8 file that replaces what is there only when it is whole, and on the disk.

    Raises:
        OSError: it could not be written; the error names the file.
    """
    try:
        with new_file(path, durable=True) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        # Writing into an open file says no name, and the hidden one tells nobody anything.
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_yaml(path: Path, values: Any) -> None:
    """Write plain values as :func:`write_whole` does."""
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def write_json(path: Path, values: Any, *, indent: int | None = 2) -> None:
    """Write plain values as :func:`write_whole` does."""
    write_whole(path, json.dumps(values, ensure_ascii=False, indent=indent) + "\n")


def read_text(path: Path) -> str | None:
    """Return what a small file says, stripped; None if it is absent, empty or unreadable.

    The log tells of all but absence.
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
    """Bring a file, or a folder's list of names, to the disk where the system can.

    Raises:
        OSError: the disk is full or broken. That a file system syncs no folders is none.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _LOST:
            raise
    finally:
        os.close(handle)


def _absent(path: Path, reason: object) -> None:
    logger.warning("%s cannot be read (%s): it counts as absent", path, reason)


def _beside(path: Path) -> Path:
    """Return a hidden name that no other process or thread takes."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
