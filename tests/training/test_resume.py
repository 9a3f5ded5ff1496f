"""A killed run that is started again has the loss of one that was never killed, to the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.toy_data import toy_samples
from tests.training.resume_job import Job, log, losses, start
from vipllava.models.adapters import AdapterSettings
from vipllava.models.building import ModelSpec
from vipllava.shards.tars import write_shards
from vipllava.training.restart import list_checkpoints


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_shards(toy_samples(22), tmp_path / "toy", max_samples=8)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "toy.yaml").write_text(
        "schema_version: 2\nname: toy\nstage: finetune\nlicence: none\nshards: toy/*.tar\n"
    )
    return tmp_path


@pytest.fixture
def with_dropout(spec: ModelSpec, tmp_path: Path) -> ModelSpec:
    """The tiny network with dropout in the language model's attention."""
    folder = tmp_path / "language_model"
    shutil.copytree(spec.language_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    return replace(spec, language_model=str(folder))


PACKED = {
    "batching": "packed",
    "pack_length": 512,
    "max_images_per_pack": 3,
    "micro_batch_size": 1,
    "global_batch_size": 2,
}
LORA = {"adapter": AdapterSettings(r=4, alpha=8, dropout=0.3)}


@pytest.mark.parametrize(
    ("data", "module"),
    [
        pytest.param({"batching": "length_grouped"}, {}, id="length_grouped"),
        pytest.param(PACKED, {}, id="packed"),
        pytest.param(PACKED, LORA, id="lora", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_has_the_same_losses(
    data_root: Path, with_dropout: ModelSpec, data: dict, module: dict
):
    def job(folder: str, **ends: int) -> Job:
        (data_root / folder).mkdir(exist_ok=True)
        return Job(data_root / folder, data_root, with_dropout, data=data, module=module, **ends)

    assert start(job("whole")) == 0
    whole = losses(data_root / "whole")
    assert len(whole) >= 8
    assert len(set(whole.values())) == len(whole)
    assert start(job("killed", kill_at=2)) == -9
    assert start(job("killed", kill_in_save_of=4)) == -9
    half, *whole_ones = sorted(p.name for p in (data_root / "killed" / "checkpoints").iterdir())
    assert whole_ones == ["000002.ckpt", "000003.ckpt"]
    assert half.startswith(".000004.ckpt.")
    assert half.endswith(".unfinished")
    assert start(job("killed", ask_at=5)) == 75
    assert list_checkpoints(data_root / "killed" / "checkpoints")[-1].name == "000006.ckpt"
    assert start(job("killed")) == 0
    assert losses(data_root / "killed") == whole
    assert log(data_root / "killed") == log(data_root / "whole")
    assert len(log(data_root / "whole").splitlines()) == 1 + len(whole)
