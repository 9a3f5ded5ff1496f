"""What the first process does alone, and how the others wait for it: by asking their store.

In a collective NCCL's watchdog would end every process after half an hour, and a process would hear
neither signals nor that the first one has failed.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch

from vipllava.types import VipLlavaError, first_line

logger = logging.getLogger(__name__)

LIMIT: Final = timedelta(hours=3)
"""How long the others wait: an export of 100 GB to storage that takes 10 MB a second."""
_HEARD_LIMIT: Final = timedelta(seconds=30)
"""How long the first process, which may hold the store, stays for the others to read from it."""
_POLL_SECONDS: Final = 0.1
_DONE: Final = "done"
_numbers = itertools.count()


def first_alone(
    is_first: bool, what: str, work: Callable[[], object], *, limit: timedelta = LIMIT
) -> None:
    """Have the first process do something while the others wait; every process has to call this.

    ``what`` names the work in messages, as in "waiting for the first process: WHAT".

    Raises:
        VipLlavaError: on the others: the work failed, the first process is gone, or it took longer
            than ``limit``. On the first one what the work raises is raised.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if is_first:
            work()
        return
    # No public way leads to the store of the default group.
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    key = f"vipllava/first_alone/{next(_numbers)}"
    if is_first:
        answer = _DONE
        try:
            work()
        except BaseException as error:
            answer = first_line(error)
            raise
        finally:
            store.set(key, answer)
            others = torch.distributed.get_world_size() - 1
            if not _until(lambda: store.add(f"{key}/heard", 0) >= others, _HEARD_LIMIT):
                logger.warning("%s: not every other process has heard of its end", what)
        return
    try:
        in_time = _until(lambda: store.check([key]), limit)
        answer = store.get(key).decode() if in_time else ""
        store.add(f"{key}/heard", 1)
    except torch.distributed.DistError as error:
        raise VipLlavaError(
            f"waiting for the first process: {what}, and it is gone ({first_line(error)}): its "
            "own log says why"
        ) from error
    if not in_time:
        raise VipLlavaError(
            f"waited {limit} for the first process: {what}, which is not done: see its log, and "
            "whether the storage hangs"
        )
    if answer != _DONE:
        raise VipLlavaError(f"the first process failed: {what}: {answer}")


def _until(is_true: Callable[[], bool], limit: timedelta) -> bool:
    """Ask again and again; the sleep in between is where a signal is heard."""
    end = time.monotonic() + limit.total_seconds()
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
