"""Launchers that queue jobs: what the Slurm preset asks for, and how a queued job ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests import preloaded
from vipllava.config.composing import CONFIG_DIR, compose_job

JOB = f"""
import json, os, sys, time
from pathlib import Path
from vipllava.config.entry import run_main
from vipllava.types import Interrupted, RecordError

def job(cfg):
    folder = Path(cfg.run_dir)
    begun = sorted(folder.glob("begun-*"))
    if cfg.seed == 2:
        raise RecordError("shard 3: record 7 has no picture")
    if cfg.seed == 5 and not begun:
        import signal
        stopped = []
        signal.signal(signal.SIGUSR2, lambda *_: stopped.append(1))
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        (folder / "begun-0").write_text(str(os.getppid()))
        while not stopped:
            time.sleep(0.01)
        raise Interrupted("stopped; start the same command again")
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("step,train/loss\\n0,1.5\\n1,0.5\\n")
    said = [os.getpid(), os.environ["WANDB_RUN_GROUP"], str(folder), sys.argv[1:]]
    (folder / "said.json").write_text(json.dumps(said))

run_main(job, config_dir=Path({str(CONFIG_DIR)!r}), config_name="train")
"""


def preset(*overrides: str, config_name: str = "train") -> dict[str, Any]:
    """Return the preset's own values, worked out in a composed job; the plugin is not needed."""
    values: Any = yaml.safe_load((CONFIG_DIR / "hydra" / "launcher" / "slurm.yaml").read_text())
    assert values.pop("defaults") == ["submitit_slurm"]
    cfg = compose_job(overrides, config_name=config_name)
    OmegaConf.set_struct(cfg, False)
    cfg.launcher = values
    found: Any = OmegaConf.to_container(cfg.launcher, resolve=True)
    return found


@pytest.mark.parametrize(
    ("overrides", "nodes", "devices"),
    [
        (["trainer=multinode", "model=7b"], 2, 8),
        (["trainer=multinode", "trainer.num_nodes=4"], 4, 8),
        (["trainer=8xa100"], 1, 8),
        (["trainer=1gpu"], 1, 1),
    ],
)
def test_nodes_and_tasks_are_the_trainers(overrides: list[str], nodes: int, devices: int):
    found = preset(*overrides)
    assert (found["nodes"], found["tasks_per_node"], found["gpus_per_node"]) == (
        nodes,
        devices,
        devices,
    )


def test_a_queued_job_comes_back():
    found = preset("model=7b", "stage=finetune")
    assert found["name"] == "7b-finetune"
    assert found["max_num_timeout"] > 0
    assert found["additional_parameters"] == {"requeue": True}
    assert 0 < found["signal_delay_s"] < 60 * found["timeout_min"]


def test_an_evaluation_is_one_process():
    found = preset(config_name="evaluate")
    assert (found["nodes"], found["tasks_per_node"], found["gpus_per_node"]) == (1, 1, 1)


def test_the_preset_fits_the_plugin():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(
            "train",
            ["hydra/launcher=slurm", "trainer=multinode", "model=7b"],
            return_hydra_config=True,
        )
    launcher = cfg.hydra.launcher
    assert launcher["_target_"].endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node) == (2, 8)


def start(
    tmp_path: Path, *arguments: str, launcher: str = "submitit_local"
) -> subprocess.Popen[str]:
    (tmp_path / "job.py").write_text(JOB)
    outer = {
        k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "WANDB_RUN_GROUP")
    }
    path = os.pathsep.join([str(CONFIG_DIR.parent), os.environ.get("PYTHONPATH", "")])
    return preloaded.Popen(
        [
            *(sys.executable, "job.py", "-m", f"hydra/launcher={launcher}", "name=queued"),
            *arguments,
        ],
        cwd=tmp_path,
        env={**outer, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        nested=True,
    )


def test_queued_jobs_are_processes_of_their_own(tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = start(tmp_path, "seed=1,3")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    folder = tmp_path / "runs" / "sweeps" / "queued"
    said = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("said.json")}
    assert set(said) == {"seed=1", "seed=3"}
    assert len({process for process, *_ in said.values()}) == 2
    for name, (_, group, run_dir, arguments) in said.items():
        assert (group, Path(run_dir)) == ("queued", folder / name)
        assert sorted(arguments) == [f"hydra.run.dir='{folder / name}'", "name=queued", name]


@pytest.mark.slow  # submitit waits a quarter of a minute for a result that may come late
def test_a_queued_job_that_fails_says_why(tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = start(tmp_path, "seed=2,3")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 2
    assert "error: a queued job did not end well" in errors
    assert "error: shard 3: record 7 has no picture" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("number", "again"),
    [(signal.SIGUSR2, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)],
    ids=["time", "cancel"],
)
def test_a_job_whose_time_is_up_is_queued_again_and_a_cancelled_one_is_not(
    tmp_path: Path, number: signal.Signals, again: bool
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = start(tmp_path, "seed=5")
    folder = tmp_path / "runs" / "queued"
    os.kill(launchers_process(folder), number)
    errors = run.communicate(timeout=120)[1]
    assert (folder / "said.json").is_file() == again
    assert run.returncode == (0 if again else 2), errors


def launchers_process(folder: Path) -> int:
    """Return the process that waits for the job of seed 5, once that has begun."""
    limit = time.monotonic() + 60
    while not (folder / "begun-0").is_file() or not (folder / "begun-0").read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)
    return int((folder / "begun-0").read_text())


def test_without_a_queue_the_code_says_that_the_sweep_can_go_on(tmp_path: Path):
    run = start(tmp_path, "seed=5,7", launcher="basic")
    folder = tmp_path / "runs" / "sweeps" / "queued"
    os.kill(launchers_process(folder / "seed=5"), signal.SIGUSR2)
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 75, errors
    assert "start the same command again" in errors
    assert not (folder / "seed=7").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has it")
def test_a_killed_sweep_leaves_no_job(tmp_path: Path):
    run = start(tmp_path, "seed=5,7", launcher="basic")
    folder = tmp_path / "runs" / "sweeps" / "queued"
    os.kill(launchers_process(folder / "seed=5"), signal.SIGKILL)
    run.communicate(timeout=60)  # no process holds the error stream any more
    assert run.returncode == -signal.SIGKILL
    assert not (folder / "seed=7").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_sweep_that_is_asked_to_stop_ends_with_its_job(
    tmp_path: Path, number: signal.Signals, code: int
):
    run = start(tmp_path, "seed=5,7", launcher="basic")
    folder = tmp_path / "runs" / "sweeps" / "queued"
    os.kill(launchers_process(folder / "seed=5"), number)
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    assert not (folder / "seed=7").exists()


def test_without_slurm_the_launcher_says_what_is_missing(tmp_path: Path):
    """Either the extra is not installed, or this is no node of a cluster."""
    if shutil.which("srun"):
        pytest.skip("this is a cluster")
    run = start(tmp_path, "seed=1", launcher="slurm")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 2
    missing = (
        "there is no `srun` here"
        if find_spec("submitit")
        else 'pip install "vipllava-lightning[slurm]"'
    )
    assert missing in errors
    assert "Traceback" not in errors
