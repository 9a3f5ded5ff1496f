"""One key, one epoch: the same words and pixels in any process, in any order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stream.mark_bytes import KINDS, digests

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_another_process_makes_the_same_bytes(hash_seed: str) -> None:
    kinds = list(KINDS)[:: -1 if hash_seed == "77" else 1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.stream.mark_bytes", *kinds],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    here = digests(kinds)
    assert json.loads(done.stdout) == here
    assert len({digest for pair in here for digest in pair}) == 2 * len(kinds)
