"""A killed run that is started again has the loss of one that was never killed, to the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.toy_data import toy_samples
from tests.training.resume_job import Job, losses, start
from vipllava.data.shards import write_shards
from vipllava.models.adapters import AdapterSettings
from vipllava.models.building import ModelSpec


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_shards(toy_samples(22), tmp_path / "toy", max_samples=8)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "toy.yaml").write_text(
        "schema_version: 1\nname: toy\nstage: finetune\nlicence: none\nshards: toy/*.tar\n"
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
    [({"batching": "length_grouped"}, {}), (PACKED, {}), (PACKED, LORA)],
    ids=["length_grouped", "packed", "lora"],
)
def test_a_killed_run_has_the_same_losses(
    data_root: Path, with_dropout: ModelSpec, data: dict, module: dict
):
    def job(folder: str, kill_at: int | None = None) -> Job:
        (data_root / folder).mkdir(exist_ok=True)
        return Job(data_root / folder, data_root, with_dropout, kill_at, data, module)

    assert start(job("whole")) == 0
    whole = losses(data_root / "whole")
    assert len(whole) >= 8
    assert len(set(whole.values())) == len(whole)
    for kill_at in (2, 5, None):
        assert start(job("killed", kill_at)) == (-9 if kill_at else 0)
    assert losses(data_root / "killed") == whole
