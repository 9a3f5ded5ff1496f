"""What a user types wrong most often: each ends with one readable message, and loses nothing.

A second start of one run is in ``tests/training/test_run_lock.py``, Ctrl-C in
``tests/test_processes.py`` (before the first step) and ``tests/training/test_signals.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded
from vipllava.config.places import CONFIG_DIR

ROOT = CONFIG_DIR.parent
MISTAKES = {
    "a wrong key": (["stage.learning_rat=1e-3"], "did you mean stage.learning_rate?"),
    "a wrong value": (["stage.epochs=many"], "stage.epochs=many: expected a whole number of at"),
    "a missing file": (["data.manifest=mine.yaml"], "data.manifest=mine.yaml: there is no such"),
    "a missing model": (["stage.checkpoint=./mine"], "stage.checkpoint=./mine: no such file or"),
    "stages in the wrong order": (["stage=finetune"], "run the stage before it or pass"),
    "a batch that does not divide": (
        ["stage.global_batch_size=100", "machine.micro_batch_size=16"],
        "nearest global batch sizes that are: 96, 112",
    ),
    "a name that leads elsewhere": (["name=../../mine"], "leads out of paths.runs; name a folder"),
    "records in place of a manifest": (["data.manifest=a.json"], "a.json is no manifest: copy"),
    "another shape": (["visual_prompts.policies.vcr.shapes=[box]"], "unknown shape `box`; the"),
    "another colour": (
        ["visual_prompts.policies.pointQA_twice.colour=pink"],
        "unknown colour `pink`; the palette has: red",
    ),
}


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``train.py`` of the checkout in another directory."""
    return preloaded.run(
        [sys.executable, str(ROOT / "train.py"), "trainer=cpu", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_message(tmp_path: Path, mistake: str):
    words, message = MISTAKES[mistake]
    # Who says 0 wants short messages, too.
    done = run(tmp_path, *words, HYDRA_FULL_ERROR="0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: this configuration cannot run: 1 problem\n  - ")
    assert message in done.stderr
    assert done.stdout == ""


def test_without_the_environment(tmp_path: Path):
    bare = [getattr(sys, "_base_executable", sys.executable), "-S", str(ROOT / "train.py")]
    for words in ([], ["--help"]):
        done = subprocess.run(
            [*bare, *words], cwd=tmp_path, env={}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {bare[0]} lacks the packages that this needs: activate")


def test_a_folder_that_cannot_be(tmp_path: Path):
    """Root, who may write anywhere, cannot write below a file."""
    (tmp_path / "runs").touch()
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the run's folder cannot be written (")
    assert line.endswith("): make room or set paths.runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        done = run(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
