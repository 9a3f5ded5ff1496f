"""docs/from_released_scripts.md: each of its values is what its command composes to."""

from __future__ import annotations

import functools
import re
import shlex
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from vipllava.config.composing import CONFIG_DIR, compose_job

PAGE = (CONFIG_DIR.parent / "docs" / "from_released_scripts.md").read_text(encoding="utf-8")

FLAGS = """
    bf16 data_path dataloader_num_workers deepspeed evaluation_strategy gradient_accumulation_steps
    gradient_checkpointing image_aspect_ratio image_folder lazy_preprocess learning_rate
    logging_steps lora_alpha lora_enable lora_r lr_scheduler_type master_port mm_projector_lr
    mm_projector_type
    mm_use_im_patch_token mm_use_im_start_end mm_vision_select_layer model_max_length
    model_name_or_path num_train_epochs output_dir per_device_eval_batch_size
    per_device_train_batch_size pretrain_mm_mlp_adapter report_to save_steps save_strategy
    save_total_limit tf32 tune_mm_mlp_adapter version vision_tower warmup_ratio weight_decay
""".split()
"""All that the scripts pass."""


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading; ticks are taken off."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def bare(cell: str) -> str:
    return cell.replace("`", "")


SCRIPTS = {bare(script): shlex.split(bare(command))[1:] for script, command in table("Commands")}
FILES = ("zero2", "zero3", "zero3_offload")


@functools.cache
def composed(*overrides: str) -> DictConfig:
    return compose_job(overrides)


def value(cfg: DictConfig, key: str) -> Any:
    found = OmegaConf.select(cfg, key, throw_on_missing=True)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def same(found: Any, written: str) -> bool:
    """Compare with YAML's reading of a cell, where 2e-5 is a text."""
    wanted = yaml.safe_load(written)
    if isinstance(found, float):
        return float(wanted) == found
    return wanted == found


def flag_values() -> dict[tuple[str, str, str], str]:
    """Return what the page says by script, flag and key: the lowest row that names the script."""
    said: dict[tuple[str, str, str], str] = {}
    for flag, scripts, _, key, wanted, _ in table("Flags"):
        words = [bare(scripts)] if scripts == "all" else bare(scripts).split(", ")
        named = [s for s in SCRIPTS if scripts == "all" or any(word in s for word in words)]
        assert named, scripts
        for script in named:
            if key != "-" and wanted:
                said[script, bare(flag), bare(key)] = bare(wanted)
    return said


def test_every_flag_of_the_scripts_is_in_the_table():
    named = set(re.findall(r"`--(\w+)`", "".join(row[0] for row in table("Flags"))))
    assert set(FLAGS) - named == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_values(script: str):
    cfg = composed(*SCRIPTS[script])
    said = {key: wanted for (name, _, key), wanted in flag_values().items() if name == script}
    assert len(said) >= 25
    wrong = {
        key: (value(cfg, key), wanted)
        for key, wanted in said.items()
        if not same(value(cfg, key), wanted)
    }
    assert wrong == {}


@pytest.mark.parametrize("file", FILES)
def test_a_deepspeed_files_values(file: str):
    cfg = composed("stage=finetune", "model=7b", "trainer=8xa100", f"strategy={file}")
    checked = 0
    for files, _, _, key, wanted, _ in table("DeepSpeed's files"):
        if key != "-" and (files == "all" or file in files.split(", ")):
            assert same(value(cfg, bare(key)), bare(wanted)), key
            checked += 1
    assert checked >= {"zero2": 9, "zero3": 14, "zero3_offload": 16}[file]


@pytest.mark.parametrize("file", FILES)
def test_the_released_recipe_does_not_clip(file: str):
    cfg = composed("model=7b", "trainer=8xa100", f"strategy={file}", "experiment=released_recipe")
    assert cfg.stage.gradient_clip is None
    assert cfg.strategy.lightning.config.gradient_clipping == 0.0
    assert cfg.trainer.gradient_clip_val is None
    assert cfg.stage.gradient_checkpointing is True


def test_what_a_remark_says_takes_effect():
    assert composed("stage.schedule=constant").stage.schedule == "constant"
    assert composed("trainer=8xv100").trainer.precision == "16-mixed"
    for trainer in ("8xa100_40g", "8xa6000", "8xrtx3090"):
        cfg = composed("stage=finetune", "model=13b", "tuning=lora", f"trainer={trainer}")
        assert cfg.machine.micro_batch_size * cfg.trainer.accumulate_grad_batches == 16
