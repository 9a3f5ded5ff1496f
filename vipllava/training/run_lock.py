"""One process at a time writes into a run's folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Final

from vipllava.files.atomic import read_yaml
from vipllava.files.locks import locked
from vipllava.types import VipLlavaError

LOCK_FILE: Final = "run.lock"


@contextlib.contextmanager
def hold_run(run_dir: Path, *, patience_s: float = 0.0) -> Generator[None]:
    """Hold a run's folder against a second start; to be called by the first process only.

    The lock is given up when the process ends, however it ends. The file says who holds it, and
    stays: what it says counts only while the lock is held.

    Args:
        run_dir: the run's folder; it has to exist.
        patience_s: how long to wait for a process that is about to end.

    Raises:
        VipLlavaError: another process holds it; names host and process.
        OSError: the file cannot be made.
    """
    path = run_dir / LOCK_FILE
    with locked(
        path,
        patience_s,
        waiting=f"waiting for {path}, which the start before this one still holds",
        without="nothing will notice a second start of this run",
    ) as mine:
        if not mine:
            raise VipLlavaError(_refusal(path))
        path.write_text(_about_me(), encoding="utf-8")
        yield


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
