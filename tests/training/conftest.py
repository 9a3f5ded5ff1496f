"""Modules and trainers for a few real steps on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import lightning
import pytest
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from tests.tiny_model import tiny_spec
from tests.toy_data import toy_samples
from tests.training.real_runs import kill_left_runs
from vipllava.config.resolvers import register_resolvers
from vipllava.models.building import ModelSpec
from vipllava.shards.tars import write_shards
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.optim import OptimizerSettings

CONF = Path(__file__).resolve().parents[2] / "conf"
MANIFEST = {"schema_version": 2, "name": "toy", "stage": "finetune", "licence": "none"}


@pytest.fixture(autouse=True)
def no_run_is_left() -> Iterator[None]:
    yield
    kill_left_runs()


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


@pytest.fixture
def make_module(spec) -> Callable[..., VipLlavaLitModule]:
    def make(**changes: object) -> VipLlavaLitModule:
        names = {field.name for field in fields(OptimizerSettings)} & changes.keys()
        settings: dict = {"learning_rate": 1e-2, **{name: changes.pop(name) for name in names}}
        arguments: dict = {
            "model": spec,
            "trainable": ["projector", "language_model"],
            "optimizer": OptimizerSettings(**settings),
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


@pytest.fixture
def config(tmp_path, tiny_sources) -> Callable[..., DictConfig]:
    """Compose a job for the tiny sources and 10 samples, four at a time."""
    write_shards(toy_samples(10), tmp_path / "toy", prefix="shard", max_samples=6)
    manifest = MANIFEST | {"shards": "toy/*.tar", "policy": "regions"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(manifest))
    register_resolvers()

    def make(*overrides: str, runs: str = "runs") -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(
                "train",
                [
                    "trainer=cpu",
                    f"paths.runs={tmp_path / runs}",
                    f"data.manifest={tmp_path / 'toy.yaml'}",
                    f"data.data_root={tmp_path}",
                    f"model.spec.vision_tower={tiny_sources.vision_tower}",
                    f"model.spec.language_model={tiny_sources.language_model}",
                    "model.spec.feature_layers=[-1,-2,1]",
                    "model.spec.image_size=28",
                    "stage.global_batch_size=4",
                    "machine.micro_batch_size=2",
                    "data.num_workers=0",
                    "callbacks=quiet",
                    *overrides,
                ],
            )

    return make
