"""Processes end with the one that started them, and hand on what asks them to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vipllava.processes import (
    RANK_VARIABLES,
    compute_on_cpu,
    end_with_parent,
    is_first_process,
    shell_code,
)
from vipllava.training.ending import hold_signals_of_starting

ROOT = Path(__file__).resolve().parents[1]
BOUND_S = 60
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has it")
LATE = """
import os, sys, time
from pathlib import Path
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
from vipllava.processes import end_with_parent
end_with_parent()
Path(sys.argv[1]).write_text("went on")
"""
NAMING = f"""
import subprocess, sys, time
from vipllava.processes import naming_parent
with naming_parent():
    subprocess.Popen([sys.executable, "-c", {LATE!r}, sys.argv[1]])
time.sleep(600)
"""
CHILD = """
import time
from vipllava.processes import end_with_parent
print(end_with_parent(), flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""
# A lock of the C library that its own holder asks for: no handler of Python's runs any more.
HANGING = """
import ctypes, signal
from vipllava.processes import begin
begin()
signal.signal(signal.SIGINT, lambda number, frame: None)
lock, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
print("ready", flush=True)
libc.pthread_mutex_lock(lock)
"""
ASKED = """
import os, signal, sys, time
from vipllava.processes import begin
begin()
def stop(number, frame):
    sys.exit(75)
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
print(os.getpid(), flush=True)
time.sleep(600)
"""
ASKING = f"""
import sys
from vipllava.processes import begin, run_child
begin()
print(*run_child([sys.executable, "-c", {ASKED!r}]), flush=True)
"""
LOADING = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from vipllava.processes import STOP_SIGNALS, signals_held, start_worker

class Squares(Dataset):
    def __len__(self):
        return 10_000
    def __getitem__(self, n):
        if n == int(sys.argv[1]):
            time.sleep(600)  # an answer of a storage that never comes
        return n * n

if __name__ == "__main__":
    heard = set()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: heard.add(number))
    loader = DataLoader(
        Squares(), batch_size=None, num_workers=2, persistent_workers=True,
        worker_init_fn=start_worker,
    )
    with signals_held():
        squares = iter(loader)
    print(next(squares), os.getpid(), flush=True)
    while heard != set(STOP_SIGNALS):
        next(squares)
        time.sleep(0.001)
    assert len([next(squares) for _ in range(50)]) == 50
    print("heard", flush=True)
"""


class Program:
    """A Python program of a few lines, in a session of its own; its first line is ``said``."""

    def __init__(self, code: str, *arguments: str, **variables: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("LOCAL_RANK", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | variables,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()

    def end(self) -> int:
        self.stdout, self.stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode


@pytest.fixture
def start() -> Generator[Callable[..., Program]]:
    """Start programs, of which nothing is left when the test ends."""
    started: list[Program] = []

    def start(code: str, *arguments: str, **variables: str) -> Program:
        started.append(Program(code, *arguments, **variables))
        return started[-1]

    yield start
    for program in started:
        with suppress(ProcessLookupError):
            os.killpg(program.process.pid, signal.SIGKILL)
        if program.process.returncode is None:
            program.process.communicate()


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(seen: Callable[[], bool]) -> None:
    limit = time.monotonic() + BOUND_S
    while not seen():
        assert time.monotonic() < limit
        time.sleep(0.02)


@linux_only
@pytest.mark.parametrize("is_rank", [True, False])
def test_a_rank_ends_with_what_started_it(start, is_rank):
    program = start(PARENT, **({"LOCAL_RANK": "1"} if is_rank else {}))
    pid, will_end = program.said
    child = psutil.Process(int(pid))
    program.process.kill()
    assert will_end == str(is_rank)
    if is_rank:
        wait_for(lambda: not runs(child))
    else:
        time.sleep(0.5)
        assert runs(child)


@linux_only
def test_one_whose_parent_has_died_before_it_could_ask_ends(start, tmp_path):
    program = start(NAMING, str(tmp_path / "went-on"))
    child = psutil.Process(int(program.said[0]))
    program.process.kill()  # nobody has taken note of its end yet: its number still exists
    wait_for(lambda: not runs(child))
    assert not (tmp_path / "went-on").exists()


def test_what_a_person_started_is_left_alone(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert end_with_parent() is False


def test_ctrl_c_ends_a_program_with_one_line(start):
    waiting = (
        "from vipllava.processes import begin\nbegin()\nprint('ready', flush=True)\nimport time"
    )
    program = start(waiting + "\ntime.sleep(600)")
    program.process.send_signal(signal.SIGINT)
    assert program.end() == 130
    assert program.stderr.split("\n") == ["", "stopped by Ctrl-C", ""]


def test_a_second_ctrl_c_ends_one_that_hangs_in_a_library(start):
    program = start(HANGING)
    limit = time.monotonic() + BOUND_S
    while program.process.poll() is None:
        assert time.monotonic() < limit
        program.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert program.end() == 130
    assert program.stderr.split("\n") == ["", "ended at once by a second Ctrl-C", ""]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_asks_to_stop_is_handed_on(start, name):
    program = start(ASKING)
    program.process.send_signal(getattr(signal, name))
    assert program.end() == 0
    code, asked_by = program.stdout.split()
    assert (int(code), int(asked_by)) == (75, getattr(signal, name))


@linux_only
def test_a_killed_program_leaves_no_child(start):
    program = start(ASKING)
    child = psutil.Process(int(program.said[0]))
    program.process.kill()
    wait_for(lambda: not runs(child))


def test_what_is_ignored_stays_so(start):
    """As under nohup."""
    ignoring = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{ASKING}"
    program = start(ignoring)
    program.process.send_signal(signal.SIGHUP)
    program.process.send_signal(signal.SIGUSR1)
    assert program.end() == 0
    assert int(program.stdout.split()[1]) == signal.SIGUSR1


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (3, 3), (-9, 137), (-15, 143)])
def test_a_code_as_a_shell_says_it(code, seen):
    assert shell_code(code) == seen


@linux_only
def test_workers_do_not_hear_what_all_processes_are_sent(start):
    program = start(LOADING, "-1")
    assert len(psutil.Process(program.process.pid).children()) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(program.process.pid, number)
    assert program.end() == 0, program.stderr
    assert program.stdout == "heard\n"


@linux_only
def test_workers_end_with_their_process_and_when_it_asks(start):
    program = start(LOADING, "3")
    workers = psutil.Process(program.process.pid).children()
    assert len(workers) == 2
    program.process.kill()
    wait_for(lambda: not any(runs(worker) for worker in workers))


@linux_only
def test_a_worker_that_hangs_ends_when_its_process_asks(start):
    ending = LOADING.replace("while heard", "sys.exit(3)\n    while heard")
    program = start(ending, "3")
    assert program.end() == 3


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        # Nodes that a person has numbered: Lightning takes the first process of each for the first.
        ({"NODE_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, False),
        # A Slurm script that names the device by LOCAL_RANK.
        ({"SLURM_PROCID": "8", "LOCAL_RANK": "0"}, False),
        # torchrun on two nodes of Slurm, which it numbers as they come.
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
    ],
)
def test_the_first_process_of_a_job(variables, is_first, monkeypatch):
    for name in (*RANK_VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == is_first


@linux_only
def test_what_starts_hears_ctrl_c_when_it_has_begun():
    """Until then it is held back, not lost: Python would end with a traceback of its own."""
    code = (
        "import signal, time\n"
        "held = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "print(held, flush=True)\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "from vipllava.processes import begin\n"
        "begin()\n"
        "time.sleep(60)\n"
    )
    started: list[subprocess.Popen[str]] = []

    def start() -> None:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    launcher = SimpleNamespace(_call_children_scripts=start)
    hold_signals_of_starting(launcher)
    launcher._call_children_scripts()
    output, errors = started[0].communicate(timeout=BOUND_S)
    assert (output, errors.strip(), started[0].returncode) == ("True\n", "stopped by Ctrl-C", 130)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_threads_for_computing_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
        compute_on_cpu.__wrapped__()
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        compute_on_cpu.__wrapped__()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
