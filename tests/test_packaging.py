"""What `make` installs: every extra is pinned, and `all` holds what needs no compiler."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Compiled against CUDA; needs older packages than the rest; not in every package index.
UNPINNED = {"flash", "s3", "dashboard"}
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match, requirement
    return match[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    return {name.lower().replace("_", "-"): version for name, version in pins}


def test_extras():
    assert set(EXTRAS) == {
        "sample",
        "deepspeed",
        "flash",
        "tensorboard",
        "wandb",
        "dashboard",
        "lora",
        "quant",
        "gguf",
        "captions",
        "s3",
        "gs",
        "slurm",
        "sweep",
        "browser",
        "endpoint",
        "chat",
        "serve",
        "demo",
        "docs",
        "dev",
        "all",
    }
    (everything,) = EXTRAS["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == set(EXTRAS) - {
        "all",
        "flash",
        "s3",
        "gs",
        "dashboard",
    }


def test_everything_that_fits_is_pinned():
    wanted = {_name(r) for r in PROJECT["dependencies"]}
    wanted |= {_name(r) for extra, rs in EXTRAS.items() if extra not in UNPINNED for r in rs}
    assert wanted - {_name(PROJECT["name"])} - set(_pins()) == set()


def test_pins_fit_the_bounds():
    pins = _pins()
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins["torch"])  # the Makefile reads it
    assert pins["omegaconf"].startswith("2.3.")
    assert pins["antlr4-python3-runtime"].startswith("4.9.")
