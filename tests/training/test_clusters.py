"""Several nodes and queues: torchrun, sbatch and submitit start jobs; a stopped one goes on."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy_data import toy_samples
from tests.training import fake_slurm
from vipllava.shards.tars import write_shards

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "slurm_job.sh"
NUM_STEPS = 24


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(toy_samples(24), root / "mine", max_samples=8)
    (root / "mine.yaml").write_text(
        "schema_version: 2\nname: mine\nstage: pretrain\nlicence: none\nshards: mine/*.tar\n"
    )
    return root


def job(data_root: Path, name: str, *more: str) -> list[str]:
    """Return train.py's arguments for two processes on the CPU."""
    return [
        *("stage=pretrain", "model=tiny", "trainer=cpu", "strategy=ddp", "callbacks=quiet"),
        *(f"data.manifest={data_root / 'mine.yaml'}", f"paths.data_root={data_root}"),
        *(f"paths.runs={data_root / 'runs'}", f"paths.manifests={ROOT / 'data_manifests'}"),
        *(f"name={name}", "stage.global_batch_size=8", "machine.micro_batch_size=4"),
        *(f"stage.epochs={NUM_STEPS // 3}", "stage.checkpoint_steps=3", "machine.num_workers=0"),
        *more,
    ]


def environment(**variables: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_"))},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        **variables,
    }


def losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / "csv" / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


@pytest.fixture(scope="module")
def whole(data_root) -> dict[int, float]:
    """The losses of two processes of one node, started by torchrun."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--standalone", str(ROOT / "train.py")),
            *job(data_root, "whole", "trainer.devices=2"),
        ],
        cwd=data_root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = losses(data_root / "runs" / "whole")
    assert sorted(rows) == list(range(NUM_STEPS))
    return rows


@pytest.mark.slow
def test_two_nodes_of_torchrun_are_two_processes(data_root, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"),
        *("--local-addr=127.0.0.1", str(ROOT / "train.py")),
        *job(data_root, "nodes", "trainer.devices=1", "trainer.num_nodes=2"),
    ]
    agents = [
        subprocess.Popen(
            command, cwd=data_root, env=environment(), stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors[0][-3000:]
    assert losses(data_root / "runs" / "nodes") == pytest.approx(whole, rel=1e-6)


def wait_for(run_dir: Path, steps: int, ended: Path) -> None:
    limit = time.monotonic() + 240
    while len(losses(run_dir)) < steps:
        assert time.monotonic() < limit
        assert not ended.is_file(), "the job has ended"
        time.sleep(0.01)


@pytest.mark.slow
def test_the_batch_script_queues_a_stopped_job_again_and_it_goes_on(data_root, whole, tmp_path):
    variables = fake_slurm.install(tmp_path)
    name = "batch"
    arguments = job(data_root, name, "trainer.devices=1", "trainer.num_nodes=2", "resume=never")
    options = ["--nodes=2", "--ntasks-per-node=1"]
    subprocess.run(
        ["sbatch", *options, str(SCRIPT), *arguments],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    run_dir = data_root / "runs" / name
    wait_for(run_dir, 5, tmp_path / "ended")
    for process in fake_slurm.tasks(tmp_path):
        os.kill(process, signal.SIGUSR1)
    assert fake_slurm.wait_for_end(tmp_path) == "0", (tmp_path / "task-0.log").read_text()[-3000:]
    assert (tmp_path / "restarts").read_text() == "1"
    assert "going on from" in (run_dir / "train.log").read_text()
    assert losses(run_dir) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_submitit_queues_a_stopped_job_again_and_it_goes_on(data_root, whole, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    variables = fake_slurm.install(tmp_path)
    name = "submitit"
    command = [
        *(sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm"),
        *job(data_root, name, "trainer.devices=1", "trainer.num_nodes=2"),
    ]
    start = subprocess.Popen(
        command, cwd=data_root, env=environment(**variables), stderr=subprocess.PIPE, text=True
    )
    run_dir = data_root / "runs" / name  # as without the queue: nothing is swept
    wait_for(run_dir, 5, tmp_path / "ended")
    for process in fake_slurm.tasks(tmp_path):
        os.kill(process, signal.SIGUSR2)
    assert fake_slurm.wait_for_end(tmp_path) == "0"
    errors = start.communicate(timeout=60)[1]
    assert start.returncode == 0, errors[-3000:]
    assert (tmp_path / "restarts").read_text() == "1"
    script = (tmp_path / "script").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=USR2@300"):
        assert f"#SBATCH {line}\n" in script
    assert losses(run_dir) == pytest.approx(whole, rel=1e-6)


def run_script(tmp_path: Path, code: int) -> tuple[int, list[str]]:
    """Run the batch script with an srun that ends so; return its code and what scontrol got."""
    for name, body in {
        "srun": f'echo "srun $*" >> {tmp_path}/log\nexit {code}',
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "stage=finetune", "name=a b"],
        env=environment(**variables, PYTHON="python"),
        timeout=30,
        check=False,
    )
    return done.returncode, (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (75, True), (138, True), (1, False), (2, False), (137, False)]
)
def test_the_batch_script_queues_again_what_has_saved(tmp_path: Path, code: int, again: bool):
    command = "srun --wait=300 python train.py stage=finetune name=a b"
    queued = ["scontrol requeue 17"] if again else []
    assert run_script(tmp_path, code) == (code, [command, *queued])


def test_the_batch_script_is_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --signal=USR1@120" in options
