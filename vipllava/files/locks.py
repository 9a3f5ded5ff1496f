"""Locks between processes, kept by the kernel: they end with their process, however it ends."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from filelock import BaseFileLock, FileLock, Timeout

from vipllava.files.atomic import read_yaml
from vipllava.types import VipLlavaError

log = logging.getLogger(__name__)

LOCK_FILE: Final = "run.lock"
_POLL_S: Final = 0.05
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(
    path: Path,
    wait_s: float = math.inf,
    *,
    waiting: str | None = None,
    without: str | None = None,
) -> Generator[BaseFileLock | None]:
    """Hold the lock of a file.

    Forked children do not inherit it. On network file systems it holds between nodes, and the
    server gives up that of a lost node after a while.

    Args:
        path: of the lock; made if missing, and left there.
        wait_s: seconds to wait for whoever holds it; 0 makes one attempt.
        waiting: what to log before the wait.
        without: what it means to go on without a lock where the file system has none: it is logged
            and the block runs. None makes that an error.

    Yields:
        The lock, to go on; None if another holds it. Its ``is_locked`` is False where the file
        system has no locks.

    Raises:
        OSError: the file cannot be made, or cannot be locked.
    """
    # A lock that only is a file would outlive a killed process.
    lock = FileLock(path, poll_interval=_POLL_S, thread_local=False, fallback_to_soft=False)
    free = False
    try:
        with suppress(Timeout):
            lock.acquire(0)
            free = True
        if not free and wait_s > 0:
            if waiting is not None:
                log.warning("%s", waiting)
            with suppress(Timeout):
                lock.acquire(-1 if wait_s == math.inf else wait_s)
                free = True
    except OSError as error:
        if without is None or error.errno not in _NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): %s", path, error, without)
        free = True
    try:
        yield lock if free else None
    finally:
        lock.release()


@contextmanager
def hold_folder(folder: Path, *, another: str, patience_s: float = 0.0) -> Generator[None]:
    """Hold a folder that exists against another process that would write into it, too.

    Its file :data:`LOCK_FILE` says who holds it, and stays: what it says counts only while the
    lock is held, so that of a process that is gone is taken over.

    Args:
        folder: to hold.
        another: what to pass for a folder of one's own; for the error.
        patience_s: how long to wait for a process that is about to end.

    Raises:
        VipLlavaError: another process holds it; names host and process.
        OSError: the file cannot be made.
    """
    path = folder / LOCK_FILE
    with locked(
        path,
        patience_s,
        waiting=f"waiting for {path}, which the start before this one still holds",
        without="nothing will notice a second start of this run",
    ) as mine:
        if not mine:
            about = read_yaml(path) or {}
            pid, host, since = (about.get(n, "(unknown)") for n in ("pid", "host", "since"))
            raise VipLlavaError(
                f"{folder} is in use by process {pid} on {host}, since {since}: wait for that run "
                f"or stop it; for a run of its own pass {another}. If there is no such process any "
                "more (a network file system may hold a lost node's lock for minutes), delete "
                f"{path}"
            )
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        about_me = f"host: {socket.gethostname()}\npid: {os.getpid()}\nsince: '{now}'\n"
        path.write_text(about_me, encoding="utf-8")
        yield
