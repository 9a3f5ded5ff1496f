"""The loss on held-out samples between steps, the best checkpoint, and an early end."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.training.checkpointing import AtomicCheckpointIO, CheckpointCallback
from vipllava.training.csv_log import CsvLog
from vipllava.types import Interrupted

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
HELD_OUT = make_samples(8, text_only=lambda i: i == 1)


def _fit(make_module, make_trainer, tmp_path: Path, folder: str, ckpt_path=None, **changes):
    arguments = {
        "max_epochs": 2,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0,
        "enable_checkpointing": True,
        "callbacks": [CheckpointCallback(tmp_path / folder, every_n_steps=3, keep_last=9)],
        "plugins": [AtomicCheckpointIO()],
        "logger": CsvLog(tmp_path / folder / "csv"),
    }
    trainer = make_trainer(folder, **(arguments | changes))
    module = make_module()
    train = Loader(make_samples(12), 2, 1)
    trainer.fit(module, train, Loader(HELD_OUT, 4, 1), ckpt_path=ckpt_path)
    return module, trainer


def _column(folder: Path, name: str) -> dict[int, float]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return {int(r["step"]): float(r[name]) for r in csv.DictReader(file) if r.get(name)}


def test_the_mean_over_all_held_out_tokens(make_module, make_trainer, tmp_path):
    module, _ = _fit(make_module, make_trainer, tmp_path, "run", max_epochs=1, val_check_interval=6)
    with torch.no_grad():
        sums = [supervised_loss_sum(module.network, batch) for batch in Loader(HELD_OUT, 4, 1)]
    expected = sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)
    assert _column(tmp_path / "run", "val/loss") == {5: pytest.approx(expected, rel=1e-6)}


def test_the_best_stays_and_a_resumed_run_knows_it(make_module, make_trainer, tmp_path):
    _fit(make_module, make_trainer, tmp_path, "run")
    found = _column(tmp_path / "run", "val/loss")
    assert sorted(found) == [2, 5, 8, 11]
    best = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)
    assert best["global_step"] - 1 == min(found, key=found.__getitem__)

    # The checkpoint of a step with a validation stands behind it.
    again, _ = _fit(
        make_module, make_trainer, tmp_path, "again", str(tmp_path / "run" / "000006.ckpt")
    )
    assert _column(tmp_path / "again", "val/loss") == {k: v for k, v in found.items() if k > 5}
    (callback,) = [c for c in again.trainer.callbacks if isinstance(c, CheckpointCallback)]
    assert callback.best_loss == pytest.approx(min(found.values()))
    assert _column(tmp_path / "again", "train/loss") == {
        k: v for k, v in _column(tmp_path / "run", "train/loss").items() if k > 5
    }


def test_asked_to_stop_while_it_validates_a_run_stops_behind_it(
    make_module, make_trainer, tmp_path
):
    _fit(make_module, make_trainer, tmp_path, "whole")

    class Asking(Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    asking = [CheckpointCallback(tmp_path / "run", every_n_steps=100), Asking()]
    with pytest.raises(Interrupted, match="stopped at step 6 by SIGTERM"):
        _fit(make_module, make_trainer, tmp_path, "run", callbacks=asking)
    checkpoint = tmp_path / "run" / "000006.ckpt"
    _fit(make_module, make_trainer, tmp_path, "run", str(checkpoint))
    for name in ("val/loss", "train/loss"):
        assert _column(tmp_path / "run", name) == _column(tmp_path / "whole", name)
