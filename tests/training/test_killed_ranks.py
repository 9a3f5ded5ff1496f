"""train.py on two processes: a lost rank ends the job, and the same command goes on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from lightning.pytorch.callbacks import Callback

from tests.data.toy_data import toy_samples
from vipllava.data.shards import write_shards

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 60
NUM_STEPS = 60


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(toy_samples(24), root / "mine", max_samples=8)
    (root / "mine.yaml").write_text(
        "schema_version: 1\nname: mine\nstage: pretrain\nlicence: none\nshards: mine/*.tar\n"
    )
    return root


class Run:
    """One start of the command; the same folder goes on."""

    def __init__(self, data_root: Path, name: str, strategy: str, *more: str) -> None:
        self.folder = data_root / "runs" / name
        command = [
            *(sys.executable, str(ROOT / "train.py"), "stage=pretrain", "model=tiny"),
            *("trainer=cpu", "trainer.devices=2", f"strategy={strategy}", "callbacks=quiet"),
            *(f"data.manifest={data_root / 'mine.yaml'}", f"paths.data_root={data_root}"),
            *(f"paths.runs={data_root / 'runs'}", f"paths.manifests={ROOT / 'data_manifests'}"),
            *(f"name={name}", "stage.global_batch_size=8", "machine.micro_batch_size=4"),
            *("stage.epochs=20", "stage.checkpoint_steps=3", "machine.num_workers=0"),
            *more,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=data_root, env=environment, stderr=subprocess.PIPE, text=True
        )

    def end(self, within_s: float = 240) -> int:
        """Wait until no process holds the error stream any more; return rank 0's exit code."""
        _, self.stderr = self.process.communicate(timeout=within_s)
        return self.process.returncode

    def wait_for(self, seen: Callable[[], bool]) -> None:
        while not seen():
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            time.sleep(0.002)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of rank 0 and rank 1."""
        main = psutil.Process(self.process.pid)
        return [main, *(p for p in main.children() if "train.py" in " ".join(p.cmdline()))]

    def rows(self) -> dict[int, float]:
        path = self.folder / "csv" / "metrics.csv"
        if not path.is_file():
            return {}
        with path.open(newline="") as file:
            return {int(r["step"]): float(r["train/loss"]) for r in csv.DictReader(file)}


def wait_until_gone(ranks: list[psutil.Process]) -> None:
    """Fail unless no rank runs any more within the bound; nobody may be there to reap it."""
    limit = time.monotonic() + BOUND_S
    while any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks):
        assert time.monotonic() < limit, "a rank hangs"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(data_root) -> dict[int, float]:
    run = Run(data_root, "whole", "ddp")
    assert run.end() == 0, run.stderr[-3000:]
    rows = run.rows()
    assert sorted(rows) == list(range(NUM_STEPS))
    return rows


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(data_root, whole, victim):
    name = f"killed-{victim}"
    run = Run(data_root, name, "ddp")
    run.wait_for(lambda: len(run.rows()) >= 2)
    ranks = run.ranks()
    assert len(ranks) == 2
    run.wait_for(lambda: len(run.rows()) >= 8)
    ranks[victim].send_signal(signal.SIGKILL)
    assert run.end(BOUND_S) != 0
    wait_until_gone(ranks)
    done = len(run.rows())
    assert done < NUM_STEPS

    again = Run(data_root, name, "ddp")
    assert again.end() == 0, again.stderr[-3000:]
    assert "going on from" in (again.folder / "train.log").read_text()
    assert again.rows() == pytest.approx(whole, rel=1e-6)


def test_a_rank_that_fails_shows_its_traceback_and_ends_the_job(data_root):
    bomb = "+callbacks.bomb._target_=tests.training.test_killed_ranks.Bomb"
    run = Run(data_root, "failing", "ddp", bomb)
    assert run.end(BOUND_S) != 0
    assert "Traceback" in run.stderr
    assert "RuntimeError: rank 1 is broken" in run.stderr


class Bomb(Callback):
    """Raises on the second process in the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise RuntimeError("rank 1 is broken")


@pytest.mark.slow
def test_all_ranks_killed_in_a_sharded_save(data_root, whole):
    run = Run(data_root, "sharded", "fsdp2")
    run.wait_for(lambda: len(run.rows()) >= 2)
    ranks = run.ranks()
    run.wait_for(lambda: any(run.folder.glob("checkpoints/0*.ckpt")))
    run.wait_for(lambda: any(run.folder.glob("checkpoints/.0*.unfinished")))
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert run.end(BOUND_S) == -signal.SIGKILL

    again = Run(data_root, "sharded", "fsdp2")
    assert again.end() == 0, again.stderr[-3000:]
    assert "going on from" in (again.folder / "train.log").read_text()
    assert again.rows() == pytest.approx(whole, rel=1e-4)
    assert not list(again.folder.glob("checkpoints/.*"))


@pytest.mark.slow
def test_asked_to_stop_both_ranks_save(data_root, whole):
    run = Run(data_root, "asked", "ddp")
    run.wait_for(lambda: len(run.rows()) >= 2)
    run.ranks()[0].send_signal(signal.SIGTERM)
    assert run.end() == 75
    assert "start the same command again" in run.stderr

    again = Run(data_root, "asked", "ddp")
    assert again.end() == 0, again.stderr[-3000:]
    assert again.rows() == pytest.approx(whole, rel=1e-6)
