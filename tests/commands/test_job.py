"""A command's arguments, and the job whose data it looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.commands.job import (
    compose_data_job,
    flag,
    split_arguments,
    whole,
)
from vipllava.types import ConfigError


def test_own_arguments_and_overrides_are_told_apart():
    own = {"n": whole(1), "strict": flag, "json": Path}
    given, rest = split_arguments(["n=3", "model=7b", "strict=true", "json=a.json", "~logger"], own)
    assert given == {"n": 3, "strict": True, "json": Path("a.json")}
    assert rest == ["model=7b", "~logger"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("n=0", "n=0: expected a whole number of at least 1"),
        ("n=x", "n=x: expected a whole number"),
        ("strict=maybe", "strict=maybe: expected true or false"),
    ],
)
def test_unreadable_arguments(argument: str, message: str):
    with pytest.raises(ConfigError, match=message):
        split_arguments([argument], {"n": whole(1), "strict": flag})


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
