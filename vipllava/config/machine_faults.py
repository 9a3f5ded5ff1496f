"""Errors that the machine causes and not the program, as messages with a remedy.

A full disk can be met at any write, by any library, so the entry points ask here once. What is not
known here is a defect and keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from vipllava.config.hardware import SHM_REMEDY

UTF8_REMEDY: Final = "set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
HOME_REMEDY: Final = "set HOME to a folder that you can write to"

_OTHER_FOLDER: Final = "name another folder (paths.runs, paths.cache, HF_HOME, HOME, TMPDIR)"
_WORDS: Final = {
    errno.ENOSPC: ("no space is left on the device", f"free some, or {_OTHER_FOLDER}"),
    errno.EDQUOT: ("your quota is used up", f"free some space, or {_OTHER_FOLDER}"),
    errno.EFBIG: ("the file is larger than is allowed here", "ulimit -f unlimited"),
    errno.EROFS: ("the file system can only be read", _OTHER_FOLDER),
    errno.EACCES: ("permission denied", f"change its owner or mode, or {_OTHER_FOLDER}"),
    errno.EPERM: ("not permitted", f"change its owner or mode, or {_OTHER_FOLDER}"),
    errno.EMFILE: ("too many open files", "ulimit -n 65536, or a lower machine.num_workers"),
    errno.ENOMEM: ("the host's memory is used up", "a lower machine.num_workers, or more memory"),
}
_NAMELESS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of writing into an open file do not say which one."""
_SPEAKING: Final = (*_NAMELESS, errno.EMFILE, errno.ENOMEM)
"""What explains itself without a file's name."""
_NEARLY_FULL: Final = 16 * 2**20
_NUMBER: Final = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_NAME: Final = re.compile(r"\[Errno \d+\] [^:]*: '([^']*)'")
_KILLED: Final = re.compile(r"DataLoader worker \(pid \d+\) is killed by signal: ([^.]*)\.")


def explain_fault(error: BaseException, folders: Iterable[str | Path] = ()) -> str | None:
    """Return what a machine lacks and what to do about it, or None where it is not the machine.

    Args:
        error: what ended the program.
        folders: that the program writes to; where an error names no file, the full one among these
            and the temporary folder is named.
    """
    return next(filter(None, (_explain_one(one, folders) for one in _chain(error))), None)


def disk_errno(error: BaseException) -> int | None:
    """Return the ``errno`` of an error of writing, whatever class a library made of it."""
    found = [number for one in _chain(error) if (number := _number_and_name(one)[0]) is not None]
    # The last is the first cause: torch's own error only says that something failed.
    return found[-1] if found else None


def free_text(folder: str | Path) -> str:
    """Return a folder with the free room of its disk, e.g. ``/runs (3.1 MB free)``."""
    free = _free(folder)
    return str(folder) if free is None else f"{folder} ({free / 1e6:.1f} MB free)"


def find_home() -> Path | None:
    """Return this user's home folder; None where neither HOME nor the system says one."""
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home() would raise
    return None if home == "~" else Path(home)


def make_output_safe() -> None:
    """Let terminals show what they cannot spell as escapes, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class LogFile(logging.FileHandler):
    """A run's log file, UTF-8 everywhere; a full disk ends the run, like any other write.

    Python's own prints a traceback for every line and goes on.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what the disk says, with the file's name; anything else is the line's own fault."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            error.filename = error.filename or self.baseFilename
            raise error
        super().handleError(record)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        # What a defect happened to follow does not explain it; torch's writer hides the reason.
        hidden = following.__context__ if _is_torch_writer(following) else None
        following = following.__cause__ or hidden


def _explain_one(error: BaseException, folders: Iterable[str | Path]) -> str | None:
    text = str(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        return (
            f"this locale ({error.encoding}) cannot spell {error.object!a}, a file's name: "
            f"{UTF8_REMEDY}"
        )
    if isinstance(error, RuntimeError):
        if "Could not determine home directory" in text:
            return f"this user has no home folder: {HOME_REMEDY}"
        killed = _KILLED.search(text)
        if (killed and killed[1] == "Bus error") or (
            "shared memory" in text and ("unable to" in text or "No space left" in text)
        ):
            free = free_text("/dev/shm")
            return f"shared memory ran out: a loader process found no room in {free}: {SHM_REMEDY}"
        if killed and killed[1] == "Killed":
            return (
                "a loader process was killed, most likely for lack of the host's memory: a lower "
                "machine.num_workers, or more memory (docker run --memory, sbatch --mem)"
            )
    number, name = _number_and_name(error)
    if number is None or (name is None and number not in _SPEAKING):
        return None
    if name is None and number in _NAMELESS:
        name = _suspects(folders)
    return ": ".join([name, *_WORDS[number]] if name else _WORDS[number])


def _number_and_name(error: BaseException) -> tuple[int | None, str | None]:
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        return error.errno if error.errno in _WORDS else None, None if name is None else str(name)
    text = str(error)
    # A loader process hands its error over as text; safetensors has an error of its own.
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        found, name = _NUMBER.search(text), _NAME.search(text)
        number = int(found[1] or found[2]) if found else None
        return number if number in _WORDS else None, name[1] if name else None
    return (errno.ENOSPC if _is_torch_writer(error) else None), None


def _is_torch_writer(error: BaseException) -> bool:
    """torch.save says neither file nor reason where a file cannot be written to its end."""
    text = str(error)
    failed = "unexpected pos" in text or "file write failed" in text
    return isinstance(error, RuntimeError) and "inline_container.cc" in text and failed


def _suspects(folders: Iterable[str | Path]) -> str:
    """Name the folders whose disks are full, or all of them where none is (a quota)."""
    known = list(dict.fromkeys(map(str, [*folders, tempfile.gettempdir()])))
    full = [folder for folder in known if (_free(folder) or 0) < _NEARLY_FULL]
    return ", ".join(map(free_text, full or known))


def _free(folder: str | Path) -> int | None:
    path = Path(folder).absolute()
    there = next((p for p in (path, *path.parents) if p.is_dir()), None)
    return None if there is None else shutil.disk_usage(there).free
