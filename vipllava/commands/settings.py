"""``NAME=VALUE`` arguments of subcommands: as Hydra writes them, without its second of start-up.

A command states its settings once; from that come reading, defaults, errors and the help text.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vipllava.types import ConfigError

_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_MANIFESTS: Final = "data_manifests"


@dataclass(frozen=True, slots=True)
class Setting:
    """One ``NAME=VALUE``.

    Attributes:
        name: left of the ``=``.
        read: makes the value of the text; raises ValueError with what is expected.
        default: the value if it is not given.
        help: what it does, and its default in words.
    """

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str


def read_settings(
    words: Sequence[str], settings: Sequence[Setting], *, positional: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a command's arguments.

    Args:
        words: the command line after the command.
        settings: the ones it knows.
        positional: names of the words that come without a name, all required.

    Returns:
        The value of every positional word and setting, by name.

    Raises:
        ConfigError: listing every unknown, repeated, missing or unreadable word.
    """
    known = {setting.name: setting for setting in settings}
    plain = [word for word in words if "=" not in word]
    values: dict[str, Any] = {setting.name: setting.default for setting in settings}
    problems: list[str] = []
    for name, word in zip(positional, plain, strict=False):
        values[name] = word
    problems += [f"{name} is missing" for name in positional[len(plain) :]]
    problems += [f"`{word}`: not NAME=VALUE" for word in plain[len(positional) :]]
    seen: set[str] = set()
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"{name}: no such setting{meant}; known: {', '.join(known)}")
        elif name in seen:
            problems.append(f"{name} is given twice")
        else:
            seen.add(name)
            try:
                values[name] = known[name].read(text)
            except ValueError as error:
                problems.append(f"{word}: {error}")
    if problems:
        raise ConfigError(
            "\n".join(["these arguments cannot be used:", *map("  - {}".format, problems)])
        )
    return values


def describe_settings(settings: Sequence[Setting]) -> str:
    """Return one line per setting, for a help text."""
    width = max((len(setting.name) for setting in settings), default=0)
    return "\n".join(
        f"  {setting.name}={'':{width - len(setting.name)}} {setting.help}" for setting in settings
    )


def switch(text: str) -> bool:
    """Read ``true`` or ``false``."""
    if text.lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return text.lower() == "true"


def count(text: str) -> int:
    """Read a number from 0."""
    if not text.isdecimal():
        raise ValueError("expected a number from 0")
    return int(text)


def count_or_all(text: str) -> int | None:
    """Read a number from 0, or ``all`` as None."""
    return None if text == "all" else count(text)


def words_of(text: str) -> tuple[str, ...]:
    """Read ``a,b`` or ``[a,b]``."""
    return tuple(word for word in text.strip("[]").replace(" ", "").split(",") if word)


def data_root_setting() -> Setting:
    """Return ``data_root``: where all data sets lie."""
    default = os.environ.get("VIPLLAVA_DATA", "data")
    return Setting(
        "data_root", str, default, "folder of all data sets (default: $VIPLLAVA_DATA, else data)"
    )


def manifests_setting() -> Setting:
    """Return ``manifests``: the folder of the known manifests."""
    here = Path(_MANIFESTS)
    default = here if here.is_dir() else _CHECKOUT / _MANIFESTS
    return Setting("manifests", Path, default, "folder of the manifests (default: data_manifests)")
