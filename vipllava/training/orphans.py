"""A process of a job ends when the one that started it is gone.

Whoever starts several processes ends them when one of them fails. If it is killed itself, nobody
does: under NCCL the others wait in a collective until its timeout, half an hour, and hold their
devices so long.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent dies, if a launcher started it.

    SIGKILL, because SIGTERM asks for a checkpoint, and that needs the others.

    Returns:
        Whether it will; False in the process that a person started, and where there is no such
        thing (macOS, Windows).
    """
    # Lightning and torchrun set it for what they start; srun looks after its own.
    if "LOCAL_RANK" not in os.environ or not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)
    return True
