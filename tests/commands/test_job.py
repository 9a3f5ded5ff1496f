"""The job whose data a command looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.commands.job import compose_data_job, job_help
from vipllava.types import ConfigError


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_help_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("COLUMNS", "80")
    lines = job_help(name).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    named = " ".join(lines)
    for word in ("visual_prompts", "name=RUN", "--cfg job", "--config-dir", "-m ", "docs/"):
        assert word in named
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "mine.yaml").touch()
    assert "mine" in job_help("evaluate", ["--config-dir", str(tmp_path)])


@pytest.mark.parametrize("overrides", [["a=b.yaml"], ["a (b).yaml"], ["é.yaml"]])
def test_a_manifest_of_any_name(tmp_path: Path, overrides: list[str]):
    own = tmp_path / overrides[0]
    own.write_text("name: mine\nshards: [a.tar]\nlicence: mine\n", encoding="utf-8")
    assert compose_data_job(str(own), ["stage=pretrain"]).data.manifest == str(own)


def test_wrong_marks_are_said_with_what_else_is_wrong():
    marks = ["visual_prompts.policies.vcr.shapes=[circle]", "visual_prompts.ranges.alpha=3"]
    with pytest.raises(ConfigError) as error:
        compose_data_job("sample_gpt4v", [*marks, "seed=-1"])
    wrong = [line.partition(";")[0] for line in str(error.value).splitlines()]
    assert wrong == [
        "this configuration cannot run: 3 problems",
        "  - seed=-1: expected a whole number of at least 0",
        "  - visual_prompts.ranges.alpha is 3",
        "  - visual_prompts.policies.vcr: unknown shape `circle`",
    ]


def test_the_stage_is_the_manifests_unless_chosen():
    assert compose_data_job("sample_gpt4v", []).stage.name == "gpt4v"
    assert compose_data_job("sample_gpt4v", ["stage=pretrain"]).stage.name == "pretrain"
    # A benchmark is looked at as stage 2 would.
    assert compose_data_job("sample_regions", []).stage.name == "finetune"
    assert compose_data_job(None, []).data.manifest == "sample_pretrain"


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(ConfigError, match="--data sample_gpt5: unknown"):
        compose_data_job("sample_gpt5", [])
    with pytest.raises(ConfigError, match=r"stage\.max_lenght: no such key"):
        compose_data_job("sample_gpt4v", ["stage.max_lenght=3"])


def test_a_data_set_without_its_option():
    with pytest.raises(ConfigError, match=r"my_marks is not KEY=VALUE; .* by --data my_marks"):
        compose_data_job(None, ["my_marks"])


def test_hardware_that_is_not_here_does_not_matter():
    cfg = compose_data_job("sample_gpt4v", ["trainer=8xa100", "strategy=zero3"])
    assert cfg.trainer.devices == 8


def test_a_configuration_folder_of_ones_own_is_added(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert compose_data_job("sample_gpt4v", ["experiment=mine"], tmp_path).seed == 7
    with pytest.raises(ConfigError, match=f"{tmp_path} has no folder `model`"):
        compose_data_job("sample_gpt4v", ["model=mine"], tmp_path)
