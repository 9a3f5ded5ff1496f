"""Mutated records, images and tars meet errors of the project's own classes, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")


def run(target: str, count: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.targets", target, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("target", ["records", "images", "tars", "exports"])
def test_a_few_hundred(target: str) -> None:
    run(target, 300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "count"),
    [("records", 6000), ("images", 6000), ("tars", 6000), ("lint", 2000), ("exports", 6000)],
)
def test_twenty_thousand(target: str, count: int) -> None:
    run(target, count)
