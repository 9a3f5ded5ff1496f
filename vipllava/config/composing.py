"""Composing a job as the entry points do, and what is wrong with overrides where that fails.

Hydra stops at the first bad override. Here each is tried alone, so that all are reported, with what
would have been allowed; then the rest is checked as if it had been the job.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.util import find_spec
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vipllava.config.checks import find_problems, format_problems
from vipllava.config.places import CONFIG_DIR
from vipllava.config.resolvers import register_resolvers
from vipllava.config.schema import did_you_mean
from vipllava.types import ConfigError, first_line

_ERRORS = (HydraException, OmegaConfBaseException)
_OPTIONS = (("--config-dir", "-cd"), ("--config-name", "-cn"), ("--config-path", "-cp"),
            ("--cfg", "-c"), ("--package", "-p"), ("--info", "-i"))  # fmt: skip
"""Hydra's own, which take a value."""


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


def composition_message(
    arguments: Sequence[str], config_dir: Path, config_name: str, error: Exception
) -> str:
    """Return everything that keeps a command line from composing; ``error`` is Hydra's own."""
    if "submitit_" in str(error) and find_spec("submitit") is None:
        install = 'pip install "vipllava-lightning[slurm]"'
        return format_problems([f"the launcher needs submitit, which is not installed: {install}"])
    problems = find_override_problems(arguments, config_dir, config_name)
    return format_problems(problems or [first_line(error)])


def find_override_problems(
    arguments: Sequence[str], config_dir: Path, config_name: str
) -> list[str]:
    """Return every problem of a command line, without the program's name, that does not compose."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    for names in _OPTIONS:
        parser.add_argument(*names, nargs="?")
    options, _ = parser.parse_known_intermixed_args(arguments)
    own = Path(options.config_dir).resolve() if options.config_dir else None
    if own and not own.is_dir():
        return [f"--config-dir {options.config_dir}: there is no such folder"]
    with _hydra(config_dir):
        overrides = [_first_of_sweep(o) if options.multirun else o for o in options.overrides]
        return _find(overrides, own, options.config_name or config_name)


def _first_of_sweep(text: str) -> str:
    """Return the override of a sweep's first job; what cannot be listed stays as it is."""
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(text)
        if override.is_sweep_override() and override.is_discrete_sweep():
            return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return text


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
    names = map(str, value if isinstance(value, list) else [value])
    name = next((name for name in names if name not in options), None)
    return name and (
        f"{group}={name}: no such option{did_you_mean(name, options)}; {group} is one of "
        f"{', '.join(sorted(options))}"
    )


def _describe(override: Override, text: str, cfg: DictConfig, error: Exception) -> str:
    key = override.key_or_group
    if override.is_sweep_override():
        return f"`{text}`: several values are a sweep; add -m, or quote a list as [a,b]"
    if override.is_add() or override.is_delete() or OmegaConf.select(cfg, key) is not None:
        return f"`{text}`: {first_line(error)}"
    sections = {"": cfg, **dict(_sections(cfg))}
    section, _, leaf = key.rpartition(".")
    while section not in sections:  # the deepest that exists
        section = section.rpartition(".")[0]
    known = [str(name) for name in sections[section]]
    # The key meant: of the same name in another section, else the likest in its own.
    same = [f"{name}.{leaf}" for name, node in sections.items() if name and leaf in node]
    same.sort(key=lambda path: path.split(".")[0] not in ("stage", "machine", "trainer"))
    prefix = f"{section}." if section else ""
    hint = did_you_mean(key, [f"{prefix}{name}" for name in known])
    hint = f" (did you mean {same[0]}?)" if same else hint
    return f"{key}: no such key{hint}; {section or 'the top level'} has {', '.join(known)}"


def _sections(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield path and node of every section that is written out, at any depth."""
    for name in map(str, cfg):
        if OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name):
            continue
        child = cfg[name]
        if isinstance(child, DictConfig):
            yield f"{prefix}{name}", child
            yield from _sections(child, f"{prefix}{name}.")
