"""train.py asked to stop: a checkpoint, an exit code that tells who asked, and nothing left."""

from __future__ import annotations

import ctypes
import os
import pty
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from tests.training.real_runs import BOUND_S, Run, wait_until_gone, write_data

WORKERS = "machine.num_workers=2"
CTRL_C = "Ctrl-C: the run stops when this step is saved; once more ends it at once\n"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl, sigwaitinfo")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def asked(run: Run, number: signal.Signals, *, everyone: bool, more_steps: int = 4) -> int:
    """Signal a run that has gone on by some steps; return its code, and see that it saved."""
    begun = len(run.rows())
    run.wait_for(lambda: len(run.rows()) >= begun + more_steps)
    if everyone:
        run.signal_all(number)
    else:
        run.process.send_signal(number)
    code = run.end(BOUND_S)
    wait_until_gone(run)
    assert run.checkpoints()[-1] == len(run.rows())  # steps that were done: none is lost
    assert f"the checkpoint is in {run.folder / 'checkpoints'}" in run.stderr
    assert "Traceback" not in run.stderr
    return code


def test_all_processes_are_asked(data_root):
    run = Run(data_root, "group", "auto", WORKERS, "machine.micro_batch_size=8")
    assert asked(run, signal.SIGINT, everyone=True) == 130
    assert f"\n{CTRL_C}error: stopped at step {len(run.rows())} by Ctrl-C" in run.stderr

    run = Run(data_root, "group", "ddp", WORKERS)
    assert asked(run, signal.SIGTERM, everyone=True) == 75
    assert f"error: stopped at step {len(run.rows())} by SIGTERM" in run.stderr


def test_ctrl_c_while_the_second_process_starts(data_root):
    """Its interpreter would end with a traceback, and the first be killed for it."""
    run = Run(data_root, "starting", "ddp")
    run.wait_for(lambda: len(run.ranks()) == 2)
    run.signal_all(signal.SIGINT)
    assert run.end(BOUND_S) == 130
    wait_until_gone(run)
    assert "stopped by Ctrl-C" in run.stderr
    assert "Fatal Python error" not in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_two_ranks_however_they_are_asked(data_root):
    whole = Run(data_root, "whole", "ddp", WORKERS)
    assert whole.end() == 0
    for number, everyone, code in (
        (signal.SIGTERM, True, 75),
        (signal.SIGTERM, False, 75),
        (signal.SIGUSR1, False, 75),
        (signal.SIGHUP, True, 75),
        (signal.SIGINT, True, 130),
        (signal.SIGINT, False, 130),
    ):
        run = Run(data_root, "asked", "ddp", WORKERS)
        assert asked(run, number, everyone=everyone) == code
    run = Run(data_root, "asked", "ddp", WORKERS)
    assert run.end() == 0
    assert run.rows() == pytest.approx(whole.rows(), rel=1e-6)


HANG = "+callbacks.hang._target_=tests.training.test_signals.Hang"
WAIT = "+callbacks.wait._target_=tests.training.test_signals.Wait"


class Hang(Callback):
    """Waits in a library for ever in the third step, as in a collective that nobody answers."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            Path(trainer.default_root_dir, f"hangs-{trainer.global_rank}").touch()
            lock, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)


class Wait(Callback):
    """Takes long before the first step, as a large model does."""

    def on_fit_start(self, trainer, pl_module) -> None:
        if trainer.global_rank == 0:
            Path(trainer.default_root_dir, "waits").touch()
        time.sleep(600)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(data_root):
    run = Run(data_root, "hanging", "ddp", WORKERS, HANG)
    run.wait_for(lambda: len(list(run.folder.glob("hangs-*"))) == 2)
    assert len(run.processes()) == 6
    limit = time.monotonic() + BOUND_S
    while run.process.poll() is None:
        assert time.monotonic() < limit
        run.signal_all(signal.SIGINT)
        time.sleep(0.5)
    assert run.end(BOUND_S) == 130
    wait_until_gone(run)
    assert "ended at once by a second Ctrl-C" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "reached", ["train.log", pytest.param("waits", marks=pytest.mark.slow)], ids=["imports", "fit"]
)
def test_ctrl_c_before_training(data_root, reached):
    run = Run(data_root, f"early-{reached}", "ddp", WAIT)
    run.wait_for(lambda: (run.folder / reached).is_file())
    run.signal_all(signal.SIGINT)
    assert run.end(BOUND_S) == 130
    wait_until_gone(run)
    assert run.stderr.endswith("\nstopped by Ctrl-C\n")
    assert "Traceback" not in run.stderr


def test_a_rank_that_is_starting_ends_with_the_first(data_root):
    run = Run(data_root, "starting", "ddp")
    run.wait_for(lambda: len(run.ranks()) == 2)
    second = run.ranks()[1]
    second.suspend()  # it has not even begun to import
    run.process.kill()
    second.resume()
    assert run.end(BOUND_S) == -signal.SIGKILL
    wait_until_gone(run)


@pytest.mark.slow
def test_a_closed_terminal(data_root):
    """With a progress bar, which fails on writing to a terminal that is gone."""
    window, programs = pty.openpty()
    run = Run(data_root, "terminal", "ddp", WORKERS, "callbacks=default", terminal=programs)
    os.close(programs)
    os.set_blocking(window, False)

    def has_trained() -> bool:
        with suppress(BlockingIOError, OSError):
            os.read(window, 1 << 16)
        return len(run.rows()) >= 4

    run.wait_for(has_trained)
    os.close(window)
    assert run.end(BOUND_S) == 75
    wait_until_gone(run)
    assert run.checkpoints()[-1] == len(run.rows())
