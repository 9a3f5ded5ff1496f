"""The classes that ``_target_`` names: do they exist, and do they take these arguments?

Importing them costs seconds (transformers, lightning), so this runs after the cheap checks.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vipllava.config.checks import format_problems
from vipllava.config.schema import did_you_mean, first_line
from vipllava.types import ConfigError

_OWN_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def check_targets(cfg: DictConfig) -> None:
    """Check every constructor call of a job; imports what it names.

    Raises:
        ConfigError: listing every problem, each naming its key.
    """
    if problems := find_target_problems(cfg):
        raise ConfigError(format_problems(problems))


def find_target_problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with the constructor calls of a job, each naming its key."""
    problems: list[str] = []
    for path, node in targets(cfg):
        name = str(node["_target_"])
        try:
            target: Any = pydoc.locate(name)
        except pydoc.ErrorDuringImport as error:
            problems.append(f"{path}._target_={name} cannot be imported: {first_line(error)}")
            continue
        if target is None:
            problems.append(f"{path}._target_={name}: there is no such class or function")
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        problems += [
            f"{path}.{key}: {name} takes no such argument{did_you_mean(str(key), parameters)}"
            for key in node
            if key not in parameters and key not in _OWN_KEYS
        ]
    return problems


def targets(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the path and node of everything with a ``_target_``, in order of appearance.

    Interpolations are not followed: what they point to is met at its own place.
    """
    if "_target_" in cfg:
        yield prefix, cfg
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        path = f"{prefix}.{key}" if prefix else key
        child: Any = cfg[key]
        items = enumerate(child) if isinstance(child, ListConfig) else ()
        for where, node in [(path, child), *((f"{path}.{index}", item) for index, item in items)]:
            if isinstance(node, DictConfig) and node:
                yield from targets(node, where)
