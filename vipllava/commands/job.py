"""The training job whose data a command looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vipllava.types import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAINING_STAGES: Final = ("pretrain", "finetune", "gpt4v", "task")


def compose_data_job(
    data: str | None, overrides: Sequence[str], config_dir: Path | None = None
) -> DictConfig:
    """Compose the training job whose data a command looks at.

    Args:
        data: a manifest's name or path; None leaves it to the job. Its stage is the job's unless
            the overrides choose one.
        overrides: of ``conf/train.yaml``.
        config_dir: a configuration folder of one's own that is added.

    Raises:
        ConfigError: listing what does not compose, or what is wrong with the job's data.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from vipllava.config.checks import check_data_config
    from vipllava.config.composing import compose_job, composition_message
    from vipllava.config.places import CONFIG_DIR
    from vipllava.shards.manifest import load_manifest

    added = [] if config_dir is None else [f"hydra.searchpath=[{config_dir.resolve()}]"]
    shown = [] if config_dir is None else ["--config-dir", str(config_dir)]

    def compose(chosen: Sequence[str]) -> DictConfig:
        try:
            cfg = compose_job([*added, *chosen])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            arguments = [*shown, *chosen]
            raise ConfigError(composition_message(arguments, CONFIG_DIR, "train", error)) from error
        check_data_config(cfg)
        return cfg

    if data is None:
        return compose(overrides)
    chosen = [*overrides, "data.mix=null", f"data.manifest={data}"]
    cfg = compose(chosen)
    if any(override.startswith("stage=") for override in overrides):
        return cfg
    manifest = load_manifest(cfg.data.manifest, cfg.data.manifests_dir)
    return compose([*chosen, f"stage={_stage_of(manifest.stage)}"])


def _stage_of(stage: str) -> str:
    """Benchmarks are looked at as stage 2 sees pictures and texts."""
    return stage if stage in _TRAINING_STAGES else "finetune"
