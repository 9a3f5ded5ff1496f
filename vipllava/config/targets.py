"""The classes that ``_target_`` names: do they exist, and do they take these arguments?

Importing them costs seconds (transformers, lightning), so this runs after the cheap checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import _locate  # get_object logs what we report
from omegaconf import DictConfig, ListConfig, OmegaConf

from vipllava.config.checks import format_problems
from vipllava.config.schema import did_you_mean
from vipllava.types import ConfigError

_OWN_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def check_targets(cfg: DictConfig) -> None:
    """Check every constructor call of a job; imports what it names.

    Raises:
        ConfigError: listing every problem.
    """
    if problems := find_target_problems(cfg):
        raise ConfigError(format_problems(problems))


def find_target_problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with the constructor calls of a job, each naming its key."""
    problems: list[str] = []
    for path, node in targets(cfg):
        name = str(node["_target_"])
        try:
            target = _locate(name)
        except Exception as error:  # noqa: BLE001 - importing foreign code can fail in any way
            reason = " ".join(str(error).split("\n")[:2])
            problems.append(f"{path}._target_={name} cannot be imported: {reason}")
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        for key in node:
            if key not in parameters and key not in _OWN_KEYS:
                problems.append(
                    f"{path}.{key}: {name} takes no such argument"
                    f"{did_you_mean(str(key), parameters)}"
                )
    return problems


def missing_arguments(node: DictConfig) -> set[str]:
    """Return the required arguments of a ``_target_`` node that it does not give."""
    parameters = inspect.signature(_locate(str(node["_target_"]))).parameters
    required = {
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    return required - {str(key) for key in node}


def targets(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the path and node of everything with a ``_target_``, in order of appearance.

    Interpolations are not followed: what they point to is met at its own place.
    """
    if "_target_" in cfg:
        yield prefix, cfg
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        child: Any = cfg[key]
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(child, DictConfig) and child:
            yield from targets(child, path)
        elif isinstance(child, ListConfig):
            for index, item in enumerate(child):
                if isinstance(item, DictConfig):
                    yield from targets(item, f"{path}.{index}")
