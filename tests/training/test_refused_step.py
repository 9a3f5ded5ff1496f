"""A refused step is found in a file, and ``replay=FILE`` shows which sample it was."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vipllava.commands.replay import replay_job
from vipllava.training import guard, lit_module
from vipllava.training.guard import StepRecord
from vipllava.training.run import run_training
from vipllava.types import CheckpointError, VipLlavaError

BAD = "toy/s006"


@pytest.fixture
def poison(monkeypatch) -> None:
    """One sample's loss is no number, wherever it is computed."""
    whole = lit_module.supervised_loss_sum

    def loss(model, batch, observers=()):
        total, count = whole(model, batch, observers)
        return total * (math.nan if BAD in batch.keys else 1.0), count

    for module in (lit_module, guard):
        monkeypatch.setattr(module, "supervised_loss_sum", loss)


def run_again(cfg) -> tuple[str, list[dict[str, str]], Path]:
    console = Console(file=io.StringIO(), width=160)
    path = replay_job(cfg, console)
    with path.open(newline="") as file:
        return console.file.getvalue(), list(csv.DictReader(file)), path


def refused(config, *overrides: str) -> Path:
    with pytest.raises(VipLlavaError, match=r"the loss is nan at step \d; .*replay=") as error:
        run_training(config(*overrides))
    path = Path(str(error.value).split("samples are in ")[1].split(";")[0])
    assert path.is_file()
    return path


@pytest.mark.parametrize("batching", ["shuffled", "packed"])
def test_the_sample_is_found(config, poison, tmp_path, batching):
    job = ["stage=pretrain", "stage.checkpoint_steps=1", f"data={batching}"]
    if batching == "packed":
        job += ["stage.pack_length=512", "data.global_batch_size=2", "data.micro_batch_size=1"]
    else:
        job = [f"data.batching={batching}", *job[:2]]
    path = refused(config, *job)
    record = StepRecord.read(path)
    assert record.reason == "the loss is nan"
    keys = [key for rank in record.keys for batch in rank for key in batch]
    assert BAD in keys
    assert record.checkpoint == (
        str(tmp_path / f"runs/tiny-pretrain/checkpoints/{record.step:06d}.ckpt")
        if record.step
        else None
    )

    text, rows, losses = run_again(config(*job, f"replay={path}"))

    assert rows[0]["key"] == BAD
    assert rows[0]["loss"] == "nan"
    assert all(math.isfinite(float(row["loss"])) for row in rows[1:])
    assert sorted(row["key"] for row in rows) == sorted(keys)
    assert f"step {record.step}: the loss is nan" in text
    page = losses.with_suffix(".html").read_text()
    shown = [f"loss {float(row['loss']):.4f}" for row in rows]
    assert re.findall(r'<span class="badge">(loss [^<]*)<', page) == shown
    assert f"those of step {record.step}, worst first" in page
    assert BAD.split("/")[1] in page


def test_the_loss_is_the_steps_own_with_its_weights(config, monkeypatch):
    """Refused by hand at step 2, behind a checkpoint of its weights."""
    job = ["stage=pretrain", "stage.checkpoint_steps=1", "stage.epochs=1"]
    losses: list[float] = []

    def judge(guard, loss):
        losses.append(loss)
        return guard._refuse("stop", "by hand") if len(losses) == 3 else None

    monkeypatch.setattr("vipllava.training.guard.LossGuard.judge", judge)
    with pytest.raises(VipLlavaError, match="by hand at step 2") as error:
        run_training(config(*job))
    path = str(error.value).split("replay=")[1].split(" ")[0]

    text, rows, _ = run_again(config(*job, f"replay={path}"))

    assert f"the global batch's loss is {losses[2]:.4f} with the weights of" in text
    values = [float(row["loss"]) for row in rows]
    counts = [int(row["num_supervised"]) for row in rows]
    whole = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    assert whole == pytest.approx(losses[2], rel=1e-5)
    assert values == sorted(values, reverse=True)


def test_other_data_or_another_model_are_refused(config, poison, tmp_path):
    job = ["stage=pretrain", "stage.checkpoint_steps=1"]
    path = refused(config, *job)
    with pytest.raises(CheckpointError, match=r"not those of the refused step.*\n- seed: saved 42"):
        replay_job(config(*job, f"replay={path}", "seed=1"))
    with pytest.raises(CheckpointError, match="no record of a refused step"):
        replay_job(config(*job, f"replay={tmp_path / 'none.json'}"))
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"model.other": torch.zeros(1)}}, foreign)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": str(foreign)}))
    with pytest.raises(CheckpointError, match=r"is of another model: it has model\.other"):
        replay_job(config(*job, f"replay={path}"))
