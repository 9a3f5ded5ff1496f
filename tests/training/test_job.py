"""A job's objects from its configuration."""

from __future__ import annotations

from pathlib import Path

from vipllava.commands.job import compose_data_job
from vipllava.training.job import forget_missing_checkpoint


def test_a_stage_that_has_not_run_needs_no_checkpoint(tmp_path: Path):
    cfg = compose_data_job("sample_finetune", [f"paths.runs={tmp_path}"])
    assert cfg.stage.checkpoint == f"{tmp_path}/tiny-pretrain/export"
    Path(cfg.stage.checkpoint).mkdir(parents=True)
    assert forget_missing_checkpoint(cfg) is None
    assert cfg.stage.checkpoint is not None
    Path(cfg.stage.checkpoint).rmdir()
    assert forget_missing_checkpoint(cfg) == tmp_path / "tiny-pretrain/export"
    assert cfg.stage.checkpoint is None
