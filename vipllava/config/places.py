"""Where the files are that travel with the package and stand beside it in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parents[1]


def shipped_folder(name: str) -> Path:
    """Return a folder of the repository's top level, which a wheel holds as ``vipllava/_NAME``."""
    inside = _PACKAGE / f"_{name}"
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONFIG_DIR: Final = shipped_folder("conf")
"""What Hydra composes jobs from."""
MANIFESTS_DIR: Final = shipped_folder("data_manifests")
"""A file for each known data set and benchmark."""


def manifests_dir() -> Path:
    """Return ``data_manifests`` of the current folder if there is one, else the shipped ones."""
    here = Path(MANIFESTS_DIR.name.removeprefix("_"))
    return here if here.is_dir() else MANIFESTS_DIR
