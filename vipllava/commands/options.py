"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from vipllava.config.places import manifests_dir


def _known_names() -> list[str]:
    return sorted(path.stem for path in manifests_dir().glob("*.yaml"))


def count_or_all(text: str | int) -> int | None:
    """Read a number from 0, or ``all`` as None."""
    if text == "all":
        return None
    if not str(text).isdecimal():
        raise ValueError("expected a number from 0, or all")
    return int(text)


def as_typed(message: str, arguments: Iterable[str]) -> str:
    """Return a library class's message with options in place of the arguments that it names.

    ``data_root`` becomes ``--data-root``, ``output=DIR`` ``--output DIR``, ``again=true``
    ``--again``. A word that could be English counts only where a value follows, and none in a path,
    a longer key or backticks, which name fields of a file.

    Args:
        message: what is to be printed.
        arguments: names of a command's options in Python.
    """
    words = "|".join(name if "_" in name else f"{name}(?==)" for name in arguments)
    if not words:
        return message
    return re.sub(
        rf"(?<![\w./`?&-])({words})(?![\w/`-]|\.\w)(?:=true\b|=(?=[\s)]|$))?(=)?",
        lambda found: f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}",
        message,
    )


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Data set, or the path of a manifest of your own.",
        autocompletion=_known_names,
    ),
]
DataRoot = Annotated[
    str, typer.Option("--data-root", envvar="VIPLLAVA_DATA", help="Folder of all data sets.")
]
Manifests = Annotated[
    Path,
    typer.Option(
        "--manifests",
        default_factory=manifests_dir,
        help="Folder of the manifests.",
        show_default="data_manifests if it exists, else those of the package",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--num-workers",
        min=0,
        help="Processes; 0: none but this one.",
        show_default="one per core, at most 16",
    ),
]
Cache = Annotated[
    Path,
    typer.Option("--cache", envvar="VIPLLAVA_CACHE", help="Folder that keeps tars from addresses."),
]
CacheSize = Annotated[
    float, typer.Option("--cache-gb", min=0.001, help="Most that the cache may hold, gigabytes.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides of conf/train.yaml.", show_default=False),
]
ConfigFolder = Annotated[
    Path | None, typer.Option("--config-dir", help="A configuration folder of your own, added.")
]
JobData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="Data set, or the path of a manifest of your own.",
        show_default="those of the job",
        autocompletion=_known_names,
    ),
]
