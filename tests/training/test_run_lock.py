"""A run's folder has one writer; a process that is gone holds nothing."""

from __future__ import annotations

import csv
import errno
import fcntl
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import preloaded
from vipllava.config.resolvers import register_resolvers
from vipllava.training.restart import hold_run
from vipllava.training.run import run_training
from vipllava.types import VipLlavaError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from vipllava.training.restart import hold_run

with hold_run(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _hold(folder: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    """Start a process that holds a folder and has a child, as a run has loader workers."""
    holder = preloaded.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


@pytest.fixture
def held(tmp_path):
    holder, child = _hold(tmp_path, 60)
    yield holder
    holder.kill()
    os.kill(child, 9)
    holder.communicate()


def test_who_holds_a_folder_is_named(tmp_path, held):
    with pytest.raises(VipLlavaError) as error, hold_run(tmp_path):
        pass
    message = str(error.value)
    assert f"{tmp_path} is in use by process {held.pid} on {socket.gethostname()}" in message
    assert f"delete {tmp_path / 'run.lock'}" in message
    # What the message says to do where the kernel of another node does not let go.
    (tmp_path / "run.lock").unlink()
    with hold_run(tmp_path):
        pass


def test_a_killed_process_holds_nothing_though_its_workers_live(tmp_path, held):
    held.kill()
    held.wait()
    with hold_run(tmp_path, patience_s=30):  # a child lets go when it first runs
        assert f"pid: {os.getpid()}" in (tmp_path / "run.lock").read_text()


def test_a_job_that_is_started_again_waits_for_the_start_before_it(tmp_path):
    holder, child = _hold(tmp_path, 1)
    try:
        with hold_run(tmp_path, patience_s=60):
            assert holder.wait(30) == 0
    finally:
        os.kill(child, 9)
        holder.communicate()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold_run(tmp_path):
        assert "nothing will notice a second start of this run" in caplog.text


def _train(cfg) -> None:
    multiprocessing.set_start_method("fork", force=True)
    register_resolvers()
    run_training(cfg)


def test_a_second_start_of_a_live_run_is_refused(config, tmp_path):
    job = ["stage=pretrain", "stage.checkpoint_steps=2"]
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    metrics = run_dir / "csv" / "metrics.csv"
    endless = config(*job, "stage.epochs=10000", "data.num_workers=1")
    first = preloaded.call(_train, endless)
    try:
        deadline = time.monotonic() + 120
        while not list((run_dir / "checkpoints").glob("0*.ckpt")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = (run_dir / "job.yaml").read_text()
        with pytest.raises(VipLlavaError, match=rf"in use by process {first.pid} on "):
            run_training(config(*job, "seed=7"))
        with pytest.raises(VipLlavaError, match=rf"in use by process {first.pid} on "):
            run_training(config(*job, "resume=never"))
        assert first.poll() is None
        assert (run_dir / "job.yaml").read_text() == before
    finally:
        first.kill()
        first.wait()
    # A dead process holds nothing, though its loader worker may live for some seconds.
    done = max(int(path.stem) for path in (run_dir / "checkpoints").glob("0*.ckpt"))
    run_training(config(*job, "stage.epochs=10000", f"trainer.max_steps={done + 2}"))
    with metrics.open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(done + 2))
