"""Errors that a machine causes become messages; a program's own keep their tracebacks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vipllava import cli
from vipllava.commands import doctor_facts
from vipllava.config import machine_faults
from vipllava.config.machine_faults import LogFile, explain_fault
from vipllava.files.atomic import write_whole
from vipllava.models.tensor_files import save_pickle, save_tensors

BUS = (
    "DataLoader worker (pid 41) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit."
)
SHM = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: ...\nRuntimeError: "
    "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def after(error: BaseException, before: BaseException) -> BaseException:
    error.__context__ = before
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space", "/r/a.json"), "/r/a.json: no space is left on the"),
        (OSError(errno.EDQUOT, "Quota", "/r/a"), "/r/a: your quota is used up: free some space"),
        (PermissionError(errno.EACCES, "Denied", "/c/x"), "/c/x: permission denied: change its"),
        (OSError(errno.EROFS, "Read-only", "/c/x"), "/c/x: the file system can only be read: name"),
        (OSError(errno.EFBIG, "Too large", "/c/x"), "larger than is allowed here: ulimit -f"),
        (OSError(errno.EMFILE, "Too many"), "too many open files: ulimit -n 65536, or a lower"),
        (OSError("Caught OSError in DataLoader worker process 0.\n[Errno 28] No space left on "
                 "device: '/c/shard'"), "/c/shard: no space is left"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "your quota is used up"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8"),
         "no space is left"),
        (RuntimeError(BUS), "shared memory ran out: a loader process found no room in /dev/shm ("),
        (RuntimeError(SHM), "docker run --shm-size=16g (or --ipc=host), or machine.num_workers=0"),
        (caused(RuntimeError("worker (pid(s) 41) exited unexpectedly"), RuntimeError(BUS)),
         "shared memory ran out"),
        (RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. "),
         "a loader process was killed, most likely for lack of the host's memory"),
        (RuntimeError("Could not determine home directory."), "no home folder: set HOME to"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_said_with_a_remedy(error: BaseException, message: str):
    assert message in str(explain_fault(error))


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        FileNotFoundError(errno.ENOENT, "No such file", "/r/a"),
        PermissionError(errno.EACCES, "Denied"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("DataLoader worker (pid 41) is killed by signal: Terminated. "),
        ValueError("[Errno 28] is only a text here"),
        after(KeyError("a"), OSError(errno.ENOSPC, "No space", "/r/a")),
    ],
)
def test_a_defect_is_not_explained_away(error: BaseException):
    assert explain_fault(error) is None


def test_where_no_file_is_named_the_full_folder_is(monkeypatch, tmp_path):
    free = {str(tmp_path / "runs"): 5000, str(tmp_path / "cache"): 2**40}
    monkeypatch.setattr(machine_faults, "_free", lambda folder: free.get(str(folder), 2**40))
    message = str(explain_fault(OSError(errno.ENOSPC, "No space"), free))
    assert message.startswith(f"{tmp_path / 'runs'} (0.0 MB free): no space is left")
    free[str(tmp_path / "runs")] = 2**40  # a quota: all are named
    message = str(explain_fault(OSError(errno.EDQUOT, "Quota"), free))
    assert message.startswith(f"{tmp_path / 'runs'} (1099511.6 MB free), {tmp_path / 'cache'} (")


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 2000 bytes: as a full disk, without one.

    Not a fixture: pytest's own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensors_that_find_no_room_are_an_error_of_the_disk(tmp_path: Path):
    for save in (save_tensors, save_pickle):
        with pytest.raises(OSError, match="weights") as caught, small_files():
            save(tmp_path / "weights", {"a": torch.zeros(5000)})
        assert str(tmp_path / "weights") in str(explain_fault(caught.value))


def test_a_file_that_finds_no_room_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "results.json"
    write_whole(path, "old")
    with pytest.raises(OSError, match=r"results\.json") as caught, small_files():
        write_whole(path, "x" * 5000)
    assert (caught.value.errno, path.read_text()) == (errno.EFBIG, "old")
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_that_finds_no_room_raises(tmp_path: Path):
    handler = LogFile(str(tmp_path / "train.log"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info("línea")
    with small_files():
        with pytest.raises(OSError, match=r"train\.log"):
            logger.info("x" * 5000)
        with contextlib.suppress(OSError):  # what it could not write is still in its buffer
            handler.close()
    assert (tmp_path / "train.log").read_text(encoding="utf-8").startswith("línea\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_commands_say_it_too(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    def full(network: bool) -> None:
        with open("/dev/full", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write("x")

    monkeypatch.setattr(doctor_facts, "look", full)
    assert cli.main(["doctor"]) == 2
    assert "no space is left on the device" in capsys.readouterr().err


def test_a_home_that_is_nowhere(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert machine_faults.find_home() is None
    monkeypatch.setenv("HOME", "/somewhere")
    assert machine_faults.find_home() == Path("/somewhere")


def test_a_name_that_the_locale_cannot_spell(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    message = explain_fault(UnicodeEncodeError("ascii", "runs/名", 5, 6, "ordinal not in range"))
    assert message == (
        "this locale (ascii) cannot spell 'runs/\\u540d', a file's name: set PYTHONUTF8=1, or "
        "LC_ALL=C.UTF-8"
    )
