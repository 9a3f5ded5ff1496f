"""Composing a job as the entry points do, and what is wrong with overrides where that fails.

Hydra stops at the first bad override. Here each is tried alone, so that all are reported, with what
would have been allowed; then the rest is checked as if it had been the job.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from vipllava.config.checks import find_problems, format_problems
from vipllava.config.overrides import OPTIONS, join_spaced, quoted, quoting, unreadable
from vipllava.config.places import CONFIG_DIR
from vipllava.config.resolvers import register_resolvers
from vipllava.config.schema import did_you_mean, nearest
from vipllava.types import ConfigError, first_line

COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What a wrong override or a wrong file of a configuration raises."""
_ERRORS = (*COMPOSING_ERRORS, OSError)
_PLUGINS = {"launcher": ("submitit", "slurm"), "sweeper": ("optuna", "sweep")}
"""By what they are for Hydra: the package of a plugin, and the extra that brings it."""


def compose_job(
    overrides: Sequence[str] = (), *, config_name: str = "train", config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """Compose ``conf/train.yaml`` or ``conf/evaluate.yaml`` with command-line overrides.

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
    with _hydra(config_dir):
        return compose(config_name, list(overrides))


def _hydra(config_dir: Path) -> AbstractContextManager[None]:
    """Prepare for :func:`compose`. Hydra itself does not run: it makes no folder, sets no log."""
    register_resolvers()
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(config_dir), version_base="1.3")


def searchpath(own: Path | None) -> list[str]:
    """Return the override that adds a configuration folder of one's own, if there is one."""
    return [] if own is None else [f"hydra.searchpath=[{quoted(str(own.resolve()))}]"]


def composition_message(
    arguments: Sequence[str], config_dir: Path, config_name: str, error: Exception
) -> str:
    """Return everything that keeps a command line from composing; ``error`` is Hydra's own."""
    for kind, (package, extra) in _PLUGINS.items():
        if f"hydra/{kind}/{package}" in str(error) and find_spec(package) is None:
            install = f'pip install "vipllava-lightning[{extra}]"'
            missing = f"the {kind} needs {package}, which is not installed: {install}"
            return format_problems([missing])
    problems = find_override_problems(arguments, config_dir, config_name)
    return format_problems(problems or [_reason(error)])


def find_override_problems(
    arguments: Sequence[str], config_dir: Path, config_name: str
) -> list[str]:
    """Return every problem of a command line, without the program's name, that does not compose."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    for names in OPTIONS:
        parser.add_argument(*names, nargs="?")
    options, _ = parser.parse_known_intermixed_args(arguments)
    own = Path(options.config_dir).resolve() if options.config_dir else None
    if own and not own.is_dir():
        return [f"--config-dir {options.config_dir}: there is no such folder"]
    words, problems = join_spaced(options.overrides)
    bad = dict(unreadable(words))
    with _hydra(config_dir):
        overrides = [word for word in words if word not in bad]
        if options.multirun:
            overrides = [_first_of_sweep(override) for override in overrides]
        problems += [*bad.values(), *_find(overrides, own, options.config_name or config_name)]
    return list(dict.fromkeys(problems))


def _reason(error: Exception) -> str:
    """Return in one line what is wrong; of a YAML file, where."""
    if not isinstance(error, MarkedYAMLError) or (mark := error.problem_mark) is None:
        return first_line(error)
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _first_of_sweep(text: str) -> str:
    """Return the override of a sweep's first job; what cannot be listed stays as it is."""
    override = OverridesParser.create().parse_override(text)
    if override.is_sweep_override() and override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return text


def _find(overrides: list[str], own: Path | None, config_name: str) -> list[str]:
    """Return the problems of overrides that can be read."""
    problems: list[str] = []
    parser, loader = OverridesParser.create(), GlobalHydra.instance().config_loader()
    good = searchpath(own)

    def try_also(text: str) -> Exception | None:
        try:
            compose(config_name, [*good, text])
        except _ERRORS as error:
            return error
        good.append(text)
        return None

    values: list[Override] = []
    for override in map(parser.parse_override, overrides):
        group = override.key_or_group
        options = loader.get_group_options(group, overrides=searchpath(own))
        if override.is_sweep_override() or not options:
            values.append(override)
        elif problem := _unknown_option(override, options):
            problems.append(problem + _lacks(own, group))
        elif error := try_also(str(override.input_line)):
            problems.append(f"`{override.input_line}`: {_reason(error)}")
    try:
        cfg = compose(config_name, good)
    except _ERRORS as error:
        return [*problems, _reason(error)]
    groups = {
        group: loader.get_group_options(group, overrides=searchpath(own))
        for group in loader.get_group_options("", ObjectType.GROUP, overrides=searchpath(own))
    }
    for override in values:
        if error := try_also(str(override.input_line)):
            group = override.key_or_group if "." not in override.key_or_group else None
            described = _describe(override, cfg, groups, error)
            problems.append(described + _lacks(own, group))
    try:
        problems += find_problems(compose(config_name, good))
    except _ERRORS as error:
        problems.append(_reason(error))
    return problems


def _lacks(own: Path | None, group: str | None) -> str:
    """Say that the user's own configuration folder lacks the group that an override names."""
    if own is None or group is None or (own / group).is_dir():
        return ""
    return f"; {own} has no folder `{group}`"


def _unknown_option(override: Override, options: list[str]) -> str | None:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return None
    if value is None:
        return f"{group}=null: use ~{group} to leave a group out"
    names = map(str, value if isinstance(value, list) else [value])
    name = next((name for name in names if name not in options), None)
    return name and (
        f"{group}={name}: no such option{did_you_mean(name, options)}; {group} is one of "
        f"{', '.join(sorted(options))}"
    )


def _describe(
    override: Override, cfg: DictConfig, groups: Mapping[str, Sequence[str]], error: Exception
) -> str:
    key, text = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        as_text = quoting(key, text.partition("=")[2])
        return (
            f"`{text}`: several values are a sweep; add -m, or quote a list as [a,b] and a text "
            f"as {as_text}"
        )
    if override.is_add() or override.is_delete() or OmegaConf.select(cfg, key) is not None:
        return f"`{text}`: {_reason(error)}"
    sections = {"": cfg, **dict(_sections(cfg))}
    parent, _, leaf = key.rpartition(".")
    section = parent
    while section not in sections:  # the deepest that exists
        section = section.rpartition(".")[0]
    if section == parent and _may_be_added(leaf, section, sections):
        return f"`{text}`: {key} is not set so far; a plus adds it: +{text}"
    known = [str(name) for name in sections[section]]
    meant = _meant(key, sections, groups, str(override.value()))
    hint = f" (did you mean {meant}?)" if meant else ""
    option = key.removeprefix(f"{section}.").partition(".")[0]
    if option in groups.get(section, ()):  # logger.wandb.entity without logger=wandb
        hint = f" (it comes with {section}={option})"
    return f"{key}: no such key{hint}; {section or 'the top level'} has {', '.join(known)}"


def _may_be_added(leaf: str, section: str, sections: Mapping[str, DictConfig]) -> bool:
    """Return whether a section could have a key: its constructor takes it, or its like has it."""
    if target := sections[section].get("_target_"):
        with suppress(Exception):  # what cannot be imported is said by the checks
            constructor: Any = pydoc.locate(str(target))
            return leaf in inspect.signature(constructor).parameters
    parent = section.rpartition(".")[0]
    return parent != "" and any(
        name.rpartition(".")[0] == parent and leaf in node for name, node in sections.items()
    )


def _meant(
    key: str, sections: Mapping[str, DictConfig], groups: Mapping[str, Sequence[str]], value: str
) -> str | None:
    """Return the key that is most likely meant: a group with that option, else the likest."""
    parent, _, leaf = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if not parent and (group := nearest(key, [g for g in groups if value in groups[g]])):
        return group
    # Of the same name in another section.
    same = [f"{name}.{leaf}" for name, node in sections.items() if name and leaf in node]
    same.sort(key=lambda path: path.split(".")[0] not in ("stage", "machine", "trainer"))
    if same:
        return (None if parent in sections else nearest(key, same)) or same[0]
    if parent in sections and (near := nearest(leaf, map(str, sections[parent]))):
        return prefix + near
    paths = [f"{name}.{k}" if name else str(k) for name, node in sections.items() for k in node]
    by_leaf = {path.rpartition(".")[2]: path for path in reversed(paths)}
    return nearest(key, paths) or by_leaf.get(nearest(leaf, by_leaf) or "")


def _sections(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield path and node of every section that is written out, at any depth."""
    for name in map(str, cfg):
        if OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name):
            continue
        child = cfg[name]
        if isinstance(child, DictConfig):
            yield f"{prefix}{name}", child
            yield from _sections(child, f"{prefix}{name}.")
