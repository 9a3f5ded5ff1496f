"""Modules and trainers for a few real steps on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.loggers import CSVLogger

from vipllava.models.building import ModelSpec
from vipllava.training.lit_module import VipLlavaLitModule


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.language_model,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )


@pytest.fixture
def make_module(spec) -> Callable[..., VipLlavaLitModule]:
    def make(**changes: object) -> VipLlavaLitModule:
        arguments: dict = {
            "model": spec,
            "trainable": ["projector", "language_model"],
            "learning_rate": 1e-2,
            "seed": 3,
        }
        return VipLlavaLitModule(**{**arguments, **changes})

    return make


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., lightning.Trainer]:
    def make(folder: str = "run", **changes: object) -> lightning.Trainer:
        run_dir: Path = tmp_path / folder
        arguments: dict = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": CSVLogger(run_dir, name="", version=""),
            "default_root_dir": run_dir,
            "limit_val_batches": 0,
        }
        return lightning.Trainer(**{**arguments, **changes})

    return make
