"""One process at a time writes into a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Final

from vipllava.files.atomic import read_yaml
from vipllava.types import VipLlavaError

logger = logging.getLogger(__name__)

LOCK_FILE: Final = "run.lock"
_POLL_S: Final = 0.5


@contextlib.contextmanager
def hold_run(run_dir: Path, *, patience_s: float = 0.0) -> Generator[None]:
    """Hold a run's folder against a second start; to be called by the first process only.

    The kernel keeps the lock and gives it up when the process ends, however it ends; on network
    file systems, too, where the server gives up that of a lost node after a while. The file says
    who holds it, and stays: what it says counts only while the lock is held.

    Args:
        run_dir: the run's folder; it has to exist.
        patience_s: how long to wait for a process that is about to end.

    Raises:
        VipLlavaError: another process holds it; names host and process.
        OSError: the file cannot be made.
    """
    path = run_dir / LOCK_FILE
    # A POSIX lock, not flock: loader workers are forks, and would go on holding that one.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if _lock(path, descriptor, time.monotonic() + patience_s):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _about_me().encode())
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int, deadline: float) -> bool:
    waits = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, by the system
            if time.monotonic() >= deadline:
                raise VipLlavaError(_refusal(path)) from error
            if not waits:
                logger.info("waiting for %s, which the start before this one still holds", path)
            waits = True
            time.sleep(_POLL_S)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): nothing will notice a second start of this run",
                path,
                error,
            )
            return False


def _about_me() -> str:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"host: {socket.gethostname()}\npid: {os.getpid()}\nsince: '{since}'\n"


def _refusal(path: Path) -> str:
    about = read_yaml(path) or {}
    who = "process {} on {}".format(about.get("pid", "(unknown)"), about.get("host", "(unknown)"))
    return (
        f"{path.parent} is in use by {who}, since {about.get('since', '(unknown)')}: wait for that "
        "run or stop it; for a run of its own pass name=NEW_NAME. If there is no such process any "
        f"more (a network file system may hold a lost node's lock for minutes), delete {path}"
    )
