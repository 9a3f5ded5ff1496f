"""What is wrong with the overrides of a command line, when Hydra could not compose it.

Hydra stops at the first bad override. Here each is tried alone, so that all are reported, with the
keys or options that would have been allowed; then the rest is checked as if it had been the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
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


def find_override_problems(
    arguments: Sequence[str], config_dir: Path, config_name: str
) -> list[str]:
    """Return every problem of a command line that does not compose.

    Args:
        arguments: the command line without the program's name.
        config_dir: absolute path of ``conf``.
        config_name: the root file in it, without suffix.
    """
    options = get_args_parser().parse_args(list(arguments))
    extra = (
        [f"hydra.searchpath=[{Path(options.config_dir).resolve()}]"] if options.config_dir else []
    )
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        overrides = [_first_of_sweep(o) if options.multirun else o for o in options.overrides]
        return _find(overrides, extra, options.config_name or config_name)


def _first_of_sweep(text: str) -> str:
    """Return the override of a sweep's first job; what cannot be listed stays as it is."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return text
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _find(overrides: list[str], extra: list[str], config_name: str) -> list[str]:
    problems: list[str] = []
    parser = OverridesParser.create()
    groups: list[str] = []
    values: list[tuple[str, Override]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"`{text}` is not KEY=VALUE: {first_line(error)}")
            continue
        options = _group_options(override)
        if not options:
            values.append((text, override))
        elif problem := _unknown_option(override, options):
            problems.append(problem)
        else:
            groups.append(text)

    base = groups + extra
    try:
        cfg = compose(config_name, base)
    except _ERRORS as error:
        return [*problems, first_line(error)]
    good = list(base)
    for text, override in values:
        try:
            compose(config_name, [*base, text])
            good.append(text)
        except _ERRORS as error:
            problems.append(_describe(override, text, cfg, error))
    try:
        problems += find_problems(compose(config_name, good))
    except _ERRORS as error:
        problems.append(first_line(error))
    return list(dict.fromkeys(problems))


def _group_options(override: Override) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return (
        loader.get_group_options(override.key_or_group, config_name=None)
        if (not override.is_sweep_override())
        else []
    )


def _unknown_option(override: Override, options: list[str]) -> str | None:
    value = override.value()
    if value is None and not override.is_delete():
        return f"{override.key_or_group}=null: use ~{override.key_or_group} to leave a group out"
    names = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    known = sorted(options)
    for name in names:
        if not override.is_delete() and name not in known:
            return (
                f"{override.key_or_group}={name}: no such option{did_you_mean(name, known)}; "
                f"{override.key_or_group} is one of {', '.join(known)}"
            )
    return None


def _describe(override: Override, text: str, cfg: DictConfig, error: Exception) -> str:
    key = override.key_or_group
    if override.is_sweep_override():
        return f"`{text}`: several values are a sweep; add -m, or quote a list as [a,b]"
    if override.is_add() or override.is_delete() or OmegaConf.select(cfg, key) is not None:
        return f"`{text}`: {first_line(error)}"
    # Walk to the deepest section that exists.
    section, node = "", cfg
    for part in key.split("."):
        child = node.get(part) if part in node else None
        if not isinstance(child, DictConfig):
            break
        section, node = (f"{section}.{part}" if section else part), child
    known = [str(name) for name in node]
    hint = _hint(key, section, known, _all_keys(cfg))
    return f"{key}: no such key{hint}; {section or 'the top level'} has {', '.join(known)}"


def _hint(key: str, section: str, siblings: list[str], everywhere: list[str]) -> str:
    """Name the key meant: of the same name in another section, else the likest sibling."""
    leaf = key.rpartition(".")[2]
    same = [path for path in everywhere if path.rpartition(".")[2] == leaf and "." in path]
    same.sort(key=lambda path: path.split(".")[0] not in ("stage", "machine", "trainer"))
    if same:
        return f" (did you mean {same[0]}?)"
    prefix = f"{section}." if section else ""
    return did_you_mean(key, [f"{prefix}{name}" for name in siblings])


def _all_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, cfg):
        path = f"{prefix}.{name}" if prefix else name
        keys.append(path)
        if not OmegaConf.is_interpolation(cfg, name) and not OmegaConf.is_missing(cfg, name):
            child = cfg[name]
            if isinstance(child, DictConfig):
                keys += _all_keys(child, path)
    return keys
