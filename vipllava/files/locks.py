"""Locks between processes, kept by the kernel: they end with their process, however it ends."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(
    path: Path,
    wait_s: float = math.inf,
    *,
    waiting: str | None = None,
    without: str | None = None,
) -> Generator[bool]:
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
        Whether to go on; False if another holds it.

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
        yield free
    finally:
        lock.release()
