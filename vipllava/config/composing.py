"""Composing a job from Python, as the entry points do from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from vipllava.config.places import CONFIG_DIR
from vipllava.config.resolvers import register_resolvers
from vipllava.types import ConfigError


def compose_job(
    overrides: Sequence[str] = (), *, config_name: str = "train", config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """Compose ``conf/train.yaml`` or ``conf/evaluate.yaml`` with command-line overrides.

    Hydra itself does not run: no folder is made, no logging is set up.

    Args:
        overrides: as on the command line, e.g. ``stage=finetune``.
        config_name: the root file, without suffix.
        config_dir: absolute path of the configuration folder.

    Raises:
        ConfigError: there is no such folder.
        hydra.errors.HydraException: an override does not fit.
    """
    if not (config_dir / f"{config_name}.yaml").is_file():
        raise ConfigError(
            f"{config_dir} has no {config_name}.yaml: name a copy of the project's conf, or add a "
            "folder of your own to it with --config-dir"
        )
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return compose(config_name, list(overrides))
