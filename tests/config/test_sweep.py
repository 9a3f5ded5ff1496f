"""`-m`: every job is a process of its own, in one folder and one W&B group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests import preloaded
from vipllava.config.composing import CONFIG_DIR, compose_job
from vipllava.config.resolvers import folder_name, register_resolvers
from vipllava.config.sweep import folder_overrides, job_command, objective_value

JOB = f"""
import json, os, sys
from pathlib import Path
from vipllava.config.entry import run_main
from vipllava.types import RecordError

def job(cfg):
    if cfg.seed == 2:
        raise RecordError("shard 3: record 7 has no picture")
    said = [os.getpid(), os.environ["WANDB_RUN_GROUP"], cfg.run_dir, sys.argv[1:]]
    Path(cfg.run_dir, "said.json").write_text(json.dumps(said))

run_main(job, config_dir=Path({str(CONFIG_DIR)!r}), config_name="train")
"""


def start(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "job.py").write_text(JOB)
    outer = {
        k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "WANDB_RUN_GROUP")
    }
    return preloaded.run(
        [sys.executable, "job.py", *arguments],
        cwd=tmp_path,
        env={**outer, "PYTHONPATH": str(CONFIG_DIR.parent), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        nested=True,
    )


def test_each_job_is_a_process_and_a_failed_one_does_not_stop_the_others(tmp_path: Path):
    # -m may stand anywhere, at the end, too.
    done = start(tmp_path, "seed=1,2,3", "name=search", "-m", "paths.data_root=/some/where")

    folder = tmp_path / "runs" / "sweeps" / "search"
    said = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("said.json")}
    assert set(said) == {"seed=1", "seed=3"}
    assert len({process for process, *_ in said.values()}) == 2
    for name, (_, group, run_dir, arguments) in said.items():
        assert group == "search"
        assert Path(run_dir) == folder / name
        assert arguments == [
            name,
            "name=search",
            "paths.data_root=/some/where",
            f"hydra.run.dir='{folder / name}'",
        ]
    assert done.returncode == 2
    assert "error: shard 3: record 7 has no picture" in done.stderr
    assert "error: job 1 of the sweep (seed=2, name=search, paths.data_root=" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_job_has_the_folder_of_the_same_command_without_m(tmp_path: Path):
    done = start(tmp_path, "-m", "seed=1", "name=alone")
    assert done.returncode == 0, done.stderr
    (said,) = tmp_path.rglob("said.json")
    assert said.parent == tmp_path / "runs" / "alone"
    assert json.loads(said.read_text())[2] == str(said.parent)


def test_a_sweep_under_torchrun_is_refused(tmp_path: Path):
    done = start(tmp_path, "-m", "seed=1,3", TORCHELASTIC_RUN_ID="none")
    assert done.returncode == 2
    assert "error: a sweep (-m) under torchrun: every process would run all" in done.stderr
    assert list(tmp_path.rglob("said.json")) == []


def test_the_command_of_a_job_leaves_the_sweeps_own_overrides_out():
    command = job_command(
        ["python", "-m", "vipllava.cli", "train"],
        ["stage.learning_rate=0.1", "data.mix={a: {epochs: 1}}"],
        [
            "hydra.mode=MULTIRUN",
            "hydra/sweeper=optuna_example",
            "hydra.sweeper.n_trials=3",
            "hydra.sweep.dir=x",
            "+hydra.launcher.n=1",
            "hydra.verbose=true",
        ],
        "/runs/it's/a=1,b=2",
    )
    assert command == [
        "python",
        "-m",
        "vipllava.cli",
        "train",
        "stage.learning_rate=0.1",
        "data.mix={a: {epochs: 1}}",
        "hydra.verbose=true",
        "hydra.run.dir='/runs/it\\'s/a=1,b=2'",
    ]


def test_folders_are_named_by_what_is_swept():
    fixed = ["stage=finetune", "+a.b='x y'", "trainer.max_steps=1"]
    keys = "hydra.job.config.override_dirname.exclude_keys=['stage','a.b','trainer.max_steps']"
    mode = ["hydra.mode=MULTIRUN", "hydra/launcher=basic"]
    assert folder_overrides([*fixed, "seed=1,2", "stage.epochs=range(1,3)"], mode) == [keys]
    # One job, for a queue: the folder is that of the command without -m.
    assert folder_overrides(fixed, mode) == [keys, "hydra.sweep.dir=${run_dir}"]
    for own in ("hydra/sweeper=optuna_example", "hydra.sweep.dir=x", "+hydra.sweeper.n_trials=3"):
        assert folder_overrides(fixed, [own]) == [keys]
    own = "hydra.job.config.override_dirname.exclude_keys=[]"
    assert folder_overrides(["seed=1,2"], [own]) == []


def test_the_folder_survives_the_command_line():
    register_resolvers()
    folder = "/runs/it's/a=1,b={c: [d, e]}"
    override = job_command(["python", "train.py"], [], [], folder)[-1]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", [override], return_hydra_config=True)
    assert cfg.hydra.run.dir == folder


def test_folders_of_jobs():
    assert folder_name("stage.learning_rate=0.1,model.spec.checkpoint=a/b") == (
        "stage.learning_rate=0.1,model.spec.checkpoint=a-b"
    )
    longs = [folder_name("x" * 300 + end) for end in "ab"]
    assert [len(name) for name in longs] == [93, 93]
    assert longs[0] != longs[1]


def test_the_objective_is_the_mean_of_the_last_ten_values(tmp_path: Path):
    assert objective_value(tmp_path, "train/loss") is None
    rows = ["step,train/loss,val/loss"]
    rows += [f"{step},{loss}," for step, loss in enumerate([100.0, *range(10)])]
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("\n".join([*rows, "10,,7.5"]) + "\n")
    assert objective_value(tmp_path, "train/loss") == 4.5
    assert objective_value(tmp_path, "val/loss") == 7.5
    assert objective_value(tmp_path, "train/mfu") is None


@pytest.mark.parametrize(
    ("run_dir", "group", "name"),
    [("runs/tiny-pretrain", None, "tiny-pretrain"), ("runs/sweeps/s/seed=1", "s", "seed=1")],
)
def test_runs_of_wandb_are_named_and_grouped(
    monkeypatch: pytest.MonkeyPatch, run_dir: str, group: str | None, name: str
):
    if group:
        monkeypatch.setenv("WANDB_RUN_GROUP", group)
    cfg = compose_job(["logger=wandb", f"run_dir='{run_dir}'"])
    wandb = cfg.logger.wandb
    assert (wandb.name, wandb.group, wandb.job_type) == (name, group, "pretrain")
    assert list(wandb.tags) == ["tiny", "pretrain", "full"]
