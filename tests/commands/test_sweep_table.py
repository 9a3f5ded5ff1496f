"""A sweep's jobs beside each other; one test runs a real sweep on the sample data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import preloaded
from vipllava import cli
from vipllava.commands.sweep_table import SweepJob, read_sweep
from vipllava.config.composing import CONFIG_DIR
from vipllava.sample_world.build import ensure_sample_world
from vipllava.types import VipLlavaError

ROOT = CONFIG_DIR.parent


def job(folder: Path, overrides: list[str], losses: list[float | None], seconds: float = 5) -> None:
    (folder / ".hydra").mkdir(parents=True)
    file = folder / ".hydra" / "overrides.yaml"
    file.write_text(yaml.safe_dump(overrides))
    os.utime(file, (1000, 1000))
    if losses:
        rows = [f"{step},{'' if x is None else x},0.5" for step, x in enumerate(losses)]
        log = folder / "csv" / "metrics.csv"
        log.parent.mkdir()
        log.write_text("\n".join(["step,train/loss,train/mfu", *rows]) + "\n")
        os.utime(log, (1000 + seconds, 1000 + seconds))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    job(folder / "a", ["seed=1", "name=s", "lint.n=[1,2]"], [3.0, 2.0, 2.5], 61)
    job(folder / "b", ["seed=2", "name=s", "lint.n=[1,2]"], [3.0, 1.5, None])
    job(folder / "c", ["seed=3", "name=s", "lint.n=[1,2]"], [])
    job(folder / "d", ["seed=4", "name=s", "lint.n=[1,2]"], [float("nan")])
    return folder


def test_jobs_by_their_best_value(sweep: Path):
    jobs = read_sweep(sweep)
    assert jobs[:2] == [
        SweepJob(("seed=2",), 1.5, 1.5, 3, 5.0, "b"),
        SweepJob(("seed=1",), 2.5, 2.0, 3, 61.0, "a"),
    ]
    assert [j.folder for j in jobs[2:]] == ["c", "d"]
    assert jobs[2] == SweepJob(("seed=3",), None, None, 0, None, "c")


def test_the_command_prints_the_table_or_json(sweep: Path, capsys):
    assert cli.main(["sweep-table", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "seed=2" in printed
    assert "1.5000" in printed
    assert "name=s" not in printed  # the same in all
    assert cli.main(["sweep-table", str(sweep), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["folder"] for row in rows] == ["b", "a", "c", "d"]


def test_what_cannot_be_tabulated(sweep: Path, tmp_path: Path):
    with pytest.raises(VipLlavaError, match="holds no jobs"):
        read_sweep(tmp_path / "nothing")
    with pytest.raises(VipLlavaError, match="logged val/loss; they logged step, train/loss, train"):
        read_sweep(sweep, "val/loss")
    (sweep / "b" / "csv" / "metrics.csv").write_text("step,train/loss\n0,much\n")
    with pytest.raises(VipLlavaError, match=r"metrics.csv: could not convert .*another program"):
        read_sweep(sweep)


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return preloaded.run(
        [sys.executable, "-m", "vipllava.cli", "train", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture
def sample_job(tmp_path: Path) -> list[str]:
    """Overrides of a one-step job on a small sample world."""
    ensure_sample_world(tmp_path / "data", scale=0.02)
    return [
        "trainer=cpu",
        "callbacks=quiet",
        "stage=finetune",
        "stage.checkpoint=null",
        "stage.global_batch_size=8",
        "machine.micro_batch_size=4",
        "data.num_workers=0",
        "trainer.max_steps=2",
        f"paths.data_root={tmp_path / 'data'}",
    ]


@pytest.mark.slow
def test_a_sweep_of_two_rates_and_two_shapes(tmp_path: Path, sample_job: list[str], capsys):
    done = train(
        tmp_path,
        "-m",
        *sample_job,
        "name=search",
        "stage.learning_rate=1e-3,2e-3",
        "visual_prompts.policies.refcocog.shapes=[rectangle],[ellipse]",
    )
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "runs" / "sweeps" / "search"
    assert cli.main(["sweep-table", str(folder)]) == 0
    assert capsys.readouterr().out.count("rectangle") >= 2
    assert cli.main(["sweep-table", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    rate, shapes = "stage.learning_rate", "visual_prompts.policies.refcocog.shapes"
    assert {tuple(sorted(row["overrides"])) for row in rows} == {
        (f"{rate}={r}", f"{shapes}=[{s}]")
        for r in ("0.001", "0.002")
        for s in ("rectangle", "ellipse")
    }
    assert [row["steps"] for row in rows] == [2] * 4
    # Other marks make other pictures and texts; the first step's loss does not know the rate.
    first = {}
    for row in rows:
        with (folder / row["folder"] / "csv" / "metrics.csv").open() as file:
            names, values = file.readline().strip().split(","), file.readline().strip().split(",")
        loss = values[names.index("train/loss")]
        first.setdefault(next(o for o in row["overrides"] if o.startswith(shapes)), set()).add(loss)
    assert [len(losses) for losses in first.values()] == [1, 1]
    assert len(set.union(*first.values())) == 2
    assert {row["folder"] for row in rows} == {
        f"{rate}={r},{shapes}=[{s}]" for r in ("0.001", "0.002") for s in ("rectangle", "ellipse")
    }


@pytest.mark.slow
def test_a_job_of_two_processes_in_a_sweep(tmp_path: Path, sample_job: list[str]):
    """Lightning starts the second with the first one's command line; without `-m` that is a job."""
    done = train(tmp_path, "-m", *sample_job, "trainer.devices=2", "strategy=ddp", "seed=1,2")
    assert done.returncode == 0, done.stderr
    jobs = read_sweep(tmp_path / "runs" / "sweeps" / "tiny-finetune")
    assert sorted(job.overrides for job in jobs) == [("seed=1",), ("seed=2",)]
    assert [job.steps for job in jobs] == [2, 2]
