"""A job's objects from its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.commands.job import compose_data_job
from vipllava.shards.manifest import Manifest, load_manifest
from vipllava.stream import datamodule as datamodules
from vipllava.training import job
from vipllava.training.job import build_datamodule, forget_missing_checkpoint, model_spec


def test_a_stage_that_has_not_run_needs_no_checkpoint(tmp_path: Path):
    cfg = compose_data_job("sample_finetune", [f"paths.runs={tmp_path}"])
    assert cfg.stage.checkpoint == f"{tmp_path}/tiny-pretrain/export"
    Path(cfg.stage.checkpoint).mkdir(parents=True)
    assert forget_missing_checkpoint(cfg) is None
    assert cfg.stage.checkpoint is not None
    Path(cfg.stage.checkpoint).rmdir()
    assert forget_missing_checkpoint(cfg) == tmp_path / "tiny-pretrain/export"
    assert cfg.stage.checkpoint is None


def test_manifests_are_loaded_once_and_a_given_spec_is_taken(
    config, monkeypatch: pytest.MonkeyPatch
):
    cfg = config()
    spec, loaded = model_spec(cfg), list[str]()

    def load(name: str, folder: str) -> Manifest:
        loaded.append(name)
        return load_manifest(name, folder)

    monkeypatch.setattr(datamodules, "load_manifest", load)
    monkeypatch.delattr(job, "model_spec")
    datamodule = build_datamodule(cfg, spec=spec)
    assert loaded == [cfg.data.manifest]
    assert len(datamodule.manifests) == 1
