"""The entry points as a user meets them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded
from vipllava.config.composing import CONFIG_DIR, find_override_problems

ROOT = CONFIG_DIR.parent


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    start = subprocess.run if "-c" in arguments else preloaded.run
    return start(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_printing_a_job_needs_neither_hardware_nor_torch(tmp_path: Path):
    script = f"""
import runpy, sys
sys.argv = ["train.py", "stage=pretrain", "model=13b", "trainer=8xa100", "--cfg", "job"]
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
finally:
    heavy = {{"torch", "lightning", "transformers"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = run(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "language_model: lmsys/vicuna-13b-v1.5" in done.stdout
    assert "devices: 8" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    done = run(
        tmp_path,
        str(ROOT / "train.py"),
        "trainer=cpu",
        f"paths.manifests={ROOT / 'data_manifests'}",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the run's folder cannot be written")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", "--cfg", "job"],
            cwd=tmp_path,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_running_it_without_the_hardware_says_what_is_missing(tmp_path: Path):
    done = run(
        tmp_path,
        str(ROOT / "train.py"),
        "stage=pretrain",
        "model=13b",
        "trainer=8xa100",
        f"paths.manifests={ROOT / 'data_manifests'}",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: this configuration cannot run: ")
    assert "trainer=8xa100 wants 8 CUDA devices with 80 GB; this machine has 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_misspelt_words_are_one_error(tmp_path: Path):
    done = run(tmp_path, str(ROOT / "train.py"), "stage=pretrian", "stage.epoch=2")
    assert done.returncode == 2
    assert "  - stage=pretrian: no such option (did you mean pretrain?); stage is one of " in (
        done.stderr
    )
    assert "  - stage.epoch: no such key (did you mean stage.epochs?); stage has " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_holds_what_ended_a_run(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(
        f"""
from pathlib import Path
from vipllava.config.entry import run_main
from vipllava.types import RecordError

def job(cfg):
    if cfg.seed == 1:
        raise RecordError("record 7 has 100 % more ids")
    raise KeyError("a defect")

run_main(job, config_dir=Path({str(CONFIG_DIR)!r}), config_name="train")
"""
    )
    for seed, ending in ((1, "record 7 has 100 % more ids"), (2, "KeyError: 'a defect'")):
        done = run(tmp_path, str(script), f"seed={seed}", "trainer=cpu", f"name=n{seed}")
        assert done.returncode == {1: 2, 2: 1}[seed]
        assert done.stderr.count("more ids") == (seed == 1)
        log = (tmp_path / "runs" / f"n{seed}" / "train.log").read_text()
        assert log.rstrip().endswith(ending)


def test_errors_of_the_program(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(
        f"""
from pathlib import Path
from vipllava.config.entry import run_main
from vipllava.types import RecordError

def job(cfg):
    if cfg.seed == 1:
        raise RecordError("record 7 has more ids than max_length=512")
    raise KeyError("a defect")

run_main(job, config_dir=Path({str(CONFIG_DIR)!r}), config_name="train")
"""
    )
    users = run(tmp_path, str(script), "seed=1")
    assert (users.returncode, users.stderr) == (
        2,
        "error: record 7 has more ids than stage.max_length=512\n",
    )
    ours = run(tmp_path, str(script), "seed=2")
    assert ours.returncode == 1
    assert "Traceback" in ours.stderr
    assert "KeyError: 'a defect'" in ours.stderr
    # The run's folder is its name, so that the same command finds it again.
    assert (tmp_path / "runs" / "tiny-pretrain" / ".hydra" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=14b", "model=14b: no such option (did you mean 13b?); model is one of 13b, 7b, "),
        ("trianer=cpu", "trianer: no such key (did you mean trainer?); the top level has name, "),
        ("logger=null", "logger=null: use ~logger to leave a group out"),
        ("foo", "`foo` is not KEY=VALUE: missing EQUAL"),
        ("stage.micro_batch_size=8", "no such key (did you mean machine.micro_batch_size?); stage"),
        ("trainer.max_epoch=1", "trainer.max_epoch: no such key (did you mean trainer.max_epochs?"),
        ("~stage.rate", "`~stage.rate`: Could not delete from config."),
        ("stage.epochs=1,2", "`stage.epochs=1,2`: several values are a sweep; add -m, or quote"),
        ("stage=task,gpt4v", "`stage=task,gpt4v`: several values are a sweep; add -m"),
        ("hydra/job_logging=loud", "hydra/job_logging=loud: no such option"),
    ],
)
def test_override_problems(override: str, message: str):
    found = find_override_problems([override, "seed=-1"], CONFIG_DIR, "train")
    assert any(message in problem for problem in found), found
    # What composes is checked all the same.
    assert "seed=-1: expected a whole number of at least 0" in found


def test_problems_of_a_sweep_are_those_of_its_first_job():
    arguments = ["-m", "stage.learning_rte=1,2", "stage=pretrain,finetune", "seed=-1,1"]
    (unknown, seed, *_) = find_override_problems(arguments, CONFIG_DIR, "train")
    assert unknown.startswith("stage.learning_rte: no such key (did you mean stage.learning_rate?)")
    assert seed == "seed=-1: expected a whole number of at least 0"


def test_sound_overrides_have_no_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert find_override_problems(["seed=1", "--cfg", "job"], CONFIG_DIR, "train") == []
