"""What a run writes down about itself at its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.training.callbacks import StartLog
from vipllava.types import CheckpointError

pytestmark = LIGHTNING_WARNINGS

JOB = {"name": "toy", "stage": {"learning_rate": 0.01, "betas": [0.9, 0.999]}}


def test_file_and_loggers_hold_configuration_code_and_environment(
    make_module, make_trainer, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "vipllava")
    monkeypatch.setattr("sys.argv", ["train.py", "stage=pretrain", "data.mix={a: {epochs: 1}}"])
    trainer = make_trainer(callbacks=[StartLog(tmp_path / "run", JOB)])
    trainer.fit(make_module(), Loader(make_samples(2), 2, 1))

    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["configuration"] == JOB
    assert written["code"].startswith("0.")
    environment = written["environment"]
    assert environment["command"] == "train.py stage=pretrain 'data.mix={a: {epochs: 1}}'"
    assert environment["packages"]["torch"] == torch.__version__
    assert (environment["processes"], environment["nodes"]) == (1, 1)
    assert environment["attention"] == "sdpa (all others need CUDA devices)"
    assert f"attention: {environment['attention']}" in caplog.messages
    logged = yaml.safe_load(Path(trainer.logger.log_dir, "hparams.yaml").read_text())
    assert logged == JOB | {"code": written["code"], "environment": environment}


def test_it_is_written_before_a_weight_is_loaded(make_module, make_trainer, spec, tmp_path):
    module = make_module()
    module.spec = type(spec)(**{**vars_of(spec), "language_model": str(tmp_path / "nothing")})
    trainer = make_trainer(callbacks=[StartLog(tmp_path / "run", JOB)])
    with pytest.raises(CheckpointError, match="nothing"):
        trainer.fit(module, Loader(make_samples(2), 2, 1))
    assert (tmp_path / "run" / "environment.json").is_file()


def vars_of(spec) -> dict:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}
