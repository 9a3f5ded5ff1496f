"""train.py on two processes: a lost rank ends the job, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.training.real_runs import BOUND_S, Run, wait_until_gone, write_data

NUM_STEPS = 60


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


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
    wait_until_gone(run)
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


def test_code_in_a_checkpoint_is_not_run(data_root):
    marker = data_root / "code_was_run"
    folder = data_root / "theirs.ckpt"
    folder.mkdir()
    code = f"cos\nmkdir\n(V{marker}\ntR.".encode()
    (folder / ".metadata").write_bytes(code)
    torch.save({"global_step": 3}, folder / "meta.pt")
    run = Run(data_root, "theirs", "fsdp2", "trainer.devices=1", f"resume={folder}")
    assert run.end() == 2
    told = " ".join(run.stderr.split())
    assert "is no checkpoint to go on from: its index .metadata cannot be read" in told
    assert "mkdir is no plain value" in told
    assert not marker.exists()
