"""A process whose launcher is killed does not outlive it, whatever it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vipllava.training.orphans import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import time
from vipllava.training.orphans import end_with_parent
print(end_with_parent(), flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has it")
@pytest.mark.parametrize("is_rank", [True, False])
def test_a_rank_ends_with_what_started_it(is_rank):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("LOCAL_RANK", None)
    if is_rank:
        environment["LOCAL_RANK"] = "1"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid, will_end = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        parent.send_signal(signal.SIGKILL)
    assert will_end == str(is_rank)
    limit = time.monotonic() + (20 if is_rank else 0.5)
    while _runs(child) and time.monotonic() < limit:
        time.sleep(0.02)
    assert _runs(child) is not is_rank
    if not is_rank:
        child.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_person_started_is_left_alone(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert end_with_parent() is False
