"""A command's ``key=value`` arguments: its own ones, and those that describe a training job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from vipllava.types import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAINING_STAGES: Final = ("pretrain", "finetune", "gpt4v", "task")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


def split_arguments(
    arguments: Sequence[str], own: Mapping[str, Callable[[str], Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Take a command's own arguments out of a command line.

    Args:
        arguments: each ``key=value``.
        own: by name what reads the value; it raises ValueError, saying what it expects.

    Returns:
        The own values that were given, and all other arguments as Hydra overrides.

    Raises:
        ConfigError: an own value cannot be read.
    """
    values: dict[str, Any] = {}
    overrides: list[str] = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name not in own or not equals:
            overrides.append(argument)
            continue
        try:
            values[name] = own[name](text)
        except ValueError as error:
            raise ConfigError(f"{argument}: expected {error}") from None
    return values, overrides


def flag(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in (*_YES, *_NO):
        raise ValueError("true or false")
    return text.lower() in _YES


def whole(low: int) -> Callable[[str], int]:
    """Return what reads a whole number of at least ``low``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise ValueError(f"a whole number of at least {low}")
        return int(text)

    return read


def compose_data_job(data: str | None, overrides: Sequence[str]) -> DictConfig:
    """Compose the training job whose data a command looks at.

    Args:
        data: a manifest's name or path; None leaves it to the job. Its stage is the job's unless
            the overrides choose one.
        overrides: of ``conf/train.yaml``.

    Raises:
        ConfigError: listing what does not compose, or what is wrong with the job's data.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from vipllava.config.checks import check_data_config
    from vipllava.config.composing import CONFIG_DIR, compose_job
    from vipllava.config.entry import composition_message
    from vipllava.shards.manifest import load_manifest

    def compose(chosen: Sequence[str]) -> DictConfig:
        try:
            cfg = compose_job(chosen)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(composition_message(chosen, CONFIG_DIR, "train", error)) from error
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
