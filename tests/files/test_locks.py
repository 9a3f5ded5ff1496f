"""Locks between processes and threads."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import preloaded
from vipllava.files.locks import locked

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from vipllava.files.locks import locked

with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_second_one_is_refused_or_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "made" / "lock"
    taken = threading.Event()

    def wait() -> None:
        with locked(path, waiting="waiting for the other") as free:
            assert free
            taken.set()

    waiting = threading.Thread(target=wait)
    with locked(path) as mine:
        assert mine
        with locked(path, 0) as free:
            assert not free
        with locked(path, 0.1, waiting="waiting in vain") as free:
            assert not free
        waiting.start()
        assert not taken.wait(0.1)
    waiting.join(30)
    assert taken.is_set()
    assert caplog.messages == ["waiting in vain", "waiting for the other"]
    with locked(path, 0) as free:
        assert free


def test_a_lock_that_was_removed_is_taken_anew(tmp_path: Path):
    """As the cache does with files that it drops; two must never hold what lies there now."""
    path = tmp_path / "lock"
    with ExitStack() as old, locked(path, 0) as new:
        assert new
        path.unlink()
        assert old.enter_context(locked(path, 0))
        with locked(path, 0) as free:
            assert not free
        old.close()
        with locked(path, 0) as free:
            assert free


def test_it_ends_with_its_process_though_a_child_lives(tmp_path: Path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    holder = preloaded.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with locked(path, 0) as free:
            assert not free
        holder.kill()
        holder.wait(30)
        with locked(path, 30) as free:  # the child lets go when it first runs
            assert free
    finally:
        os.kill(child, 9)
        holder.communicate()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock", 0, without="two may write at once") as free:
        assert free
    assert caplog.messages == [
        f"{tmp_path / 'lock'} cannot be locked ([Errno {errno.ENOLCK}] No locks available): two "
        "may write at once"
    ]


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock", without="no matter"):  # noqa: PT011
        pass
