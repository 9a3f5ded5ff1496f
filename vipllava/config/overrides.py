"""What is wrong with the overrides of a command line, when Hydra could not compose it.

Hydra stops at the first bad override. Here each is tried alone, so that all are reported, with the
keys or options that would have been allowed; then the rest is checked as if it had been the job.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vipllava.config.checks import find_problems
from vipllava.config.resolvers import register_resolvers
from vipllava.config.schema import did_you_mean
from vipllava.types import first_line

_ERRORS = (HydraException, OmegaConfBaseException)
_OPTIONS = (("--config-dir", "-cd"), ("--config-name", "-cn"), ("--config-path", "-cp"),
            ("--cfg", "-c"), ("--package", "-p"), ("--info", "-i"))  # fmt: skip
"""Hydra's own, which take a value."""


def find_override_problems(
    arguments: Sequence[str], config_dir: Path, config_name: str
) -> list[str]:
    """Return every problem of a command line that does not compose.

    Args:
        arguments: the command line without the program's name.
        config_dir: absolute path of ``conf``.
        config_name: the root file in it, without suffix.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    for names in _OPTIONS:
        parser.add_argument(*names, nargs="?")
    options, _ = parser.parse_known_intermixed_args(arguments)
    own = Path(options.config_dir).resolve() if options.config_dir else None
    if own is not None and not own.is_dir():
        return [f"--config-dir {options.config_dir}: there is no such folder"]
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        overrides = [_first_of_sweep(o) if options.multirun else o for o in options.overrides]
        return _find(overrides, own, options.config_name or config_name)


def _first_of_sweep(text: str) -> str:
    """Return the override of a sweep's first job; what cannot be listed stays as it is."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return text
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _find(overrides: list[str], own: Path | None, config_name: str) -> list[str]:
    problems: list[str] = []
    parser, loader = OverridesParser.create(), GlobalHydra.instance().config_loader()
    good = [f"hydra.searchpath=[{own}]"] if own else []
    values: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"`{text}` is not KEY=VALUE: {first_line(error)}")
            continue
        sweep = override.is_sweep_override()
        options = [] if sweep else loader.get_group_options(override.key_or_group)
        if not options:
            values.append(override)
        elif problem := _unknown_option(override, options):
            problems.append(problem + _lacks(own, override.key_or_group))
        else:
            good.append(text)

    base = list(good)
    try:
        cfg = compose(config_name, base)
    except _ERRORS as error:
        return [*problems, first_line(error)]
    for override in values:
        text = str(override.input_line)
        try:
            compose(config_name, [*base, text])
            good.append(text)
        except _ERRORS as error:
            group = override.key_or_group if "." not in override.key_or_group else None
            problems.append(_describe(override, text, cfg, error) + _lacks(own, group))
    try:
        problems += find_problems(compose(config_name, good))
    except _ERRORS as error:
        problems.append(first_line(error))
    return list(dict.fromkeys(problems))


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
    for name in map(str, value if isinstance(value, list) else [value]):
        if name not in options:
            return (
                f"{group}={name}: no such option{did_you_mean(name, options)}; {group} is one of "
                f"{', '.join(sorted(options))}"
            )
    return None


def _describe(override: Override, text: str, cfg: DictConfig, error: Exception) -> str:
    key = override.key_or_group
    if override.is_sweep_override():
        return f"`{text}`: several values are a sweep; add -m, or quote a list as [a,b]"
    if override.is_add() or override.is_delete() or OmegaConf.select(cfg, key) is not None:
        return f"`{text}`: {first_line(error)}"
    sections = {"": cfg, **dict(_sections(cfg))}
    # The deepest section of the key's that exists.
    section = key.rpartition(".")[0]
    while section not in sections:
        section = section.rpartition(".")[0]
    known = [str(name) for name in sections[section]]
    hint = _hint(key, section, sections)
    return f"{key}: no such key{hint}; {section or 'the top level'} has {', '.join(known)}"


def _hint(key: str, section: str, sections: dict[str, DictConfig]) -> str:
    """Name the key meant: of the same name in another section, else the likest in its own."""
    leaf = key.rpartition(".")[2]
    same = [f"{name}.{leaf}" for name, node in sections.items() if name and leaf in node]
    same.sort(key=lambda path: path.split(".")[0] not in ("stage", "machine", "trainer"))
    if same:
        return f" (did you mean {same[0]}?)"
    prefix = f"{section}." if section else ""
    return did_you_mean(key, [f"{prefix}{name}" for name in sections[section]])


def _sections(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield path and node of every section that is written out, at any depth."""
    for name in map(str, cfg):
        if OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name):
            continue
        child = cfg[name]
        if isinstance(child, DictConfig):
            yield f"{prefix}{name}", child
            yield from _sections(child, f"{prefix}{name}.")
