"""The job whose data a command looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.commands.job import compose_data_job
from vipllava.types import ConfigError


def test_the_stage_is_the_manifests_unless_chosen():
    assert compose_data_job("sample_gpt4v", []).stage.name == "gpt4v"
    assert compose_data_job("sample_gpt4v", ["stage=pretrain"]).stage.name == "pretrain"
    # A benchmark is looked at as stage 2 would.
    assert compose_data_job("sample_regions", []).stage.name == "finetune"
    assert compose_data_job(None, []).data.manifest == "sample_pretrain"


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(ConfigError, match=r"data\.manifest=sample_gpt5: unknown"):
        compose_data_job("sample_gpt5", [])
    with pytest.raises(ConfigError, match=r"stage\.max_lenght: no such key"):
        compose_data_job("sample_gpt4v", ["stage.max_lenght=3"])


def test_hardware_that_is_not_here_does_not_matter():
    cfg = compose_data_job("sample_gpt4v", ["trainer=8xa100", "strategy=zero3"])
    assert cfg.trainer.devices == 8


def test_a_configuration_folder_of_ones_own_is_added(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert compose_data_job("sample_gpt4v", ["experiment=mine"], tmp_path).seed == 7
    with pytest.raises(ConfigError, match=f"{tmp_path} has no folder `model`"):
        compose_data_job("sample_gpt4v", ["model=mine"], tmp_path)
