"""Ranks that somebody left over in the environment, and what launchers have started."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests import preloaded
from vipllava.config import launch_checks
from vipllava.config.composing import CONFIG_DIR
from vipllava.config.hardware import Hardware
from vipllava.config.schema import JobValues

ROOT = CONFIG_DIR.parent
ELASTIC = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "9",
    "LOCAL_RANK": "1",
}  # fmt: skip
BATCH = {
    "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "vip", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
}  # fmt: skip
TASK = BATCH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
BY_HAND = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}
JSRUN = {
    "LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/r", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_SIZE": "16", "JSM_NAMESPACE_RANK": "0",
}  # fmt: skip


def problems(devices: int = 1, nodes: int = 1, strategy: str = "ddp") -> list[str]:
    trainer = {"devices": devices, "num_nodes": nodes}
    cfg = OmegaConf.create({"trainer": trainer, "strategy": {"name": strategy}})
    return list(launch_checks.check_launch(JobValues(cfg, Hardware())))


def of_one_process() -> list[str]:
    return list(launch_checks.check_single_process(JobValues(OmegaConf.create({}), Hardware())))


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch):
    def setenv(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return setenv


@pytest.mark.parametrize(
    "name",
    [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
        "JSM_NAMESPACE_RANK",
    ],
)
@pytest.mark.parametrize("value", ["0", "3", ""])
def test_a_rank_that_nobody_gave_is_refused(setenv, name: str, value: str):
    assert problems() == of_one_process() == []
    setenv({name: value})
    (found,) = problems()
    assert found.startswith(f"{name}={value}: set, and no launcher has started this process")
    assert f"`env -u {name} vipllava train ...`" in found
    assert of_one_process() == [found]


def test_what_an_image_left_over_is_one_problem_with_one_command(setenv):
    setenv({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"})
    (found,) = problems(devices=8)
    assert found.startswith("RANK=0, LOCAL_RANK=0, WORLD_SIZE=8: set, and ")
    assert "`env -u RANK -u LOCAL_RANK -u WORLD_SIZE vipllava train ...`" in found


def test_the_processes_that_lightning_starts_itself_are_not_refused(setenv, monkeypatch):
    setenv(
        {
            "LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }
    )  # fmt: skip
    assert len(problems(devices=2)) == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "hydra.job.name=train_ddp_process_1"])
    assert problems(devices=2) == []


@pytest.mark.parametrize(
    ("variables", "nodes", "message"),
    [
        (ELASTIC, 2, ""),
        (ELASTIC, 4, "torchrun started 8 processes here and 16 in all"),
        (ELASTIC, 4, "use --nproc-per-node=8 --nnodes=4"),
        (ELASTIC, 4, "if torchrun did not start this process: `env -u TORCHELASTIC_RUN_ID -u RANK"),
        (ELASTIC | {"LOCAL_WORLD_SIZE": "4"}, 2, "torchrun started 4"),
        (ELASTIC | {"RANK": "16"}, 2, "RANK=16 LOCAL_RANK=1 are none of 16 processes"),
        (ELASTIC | {"LOCAL_RANK": ""}, 2, "RANK=9 LOCAL_RANK= are none of 16 processes"),
        (ELASTIC | {"OMPI_COMM_WORLD_SIZE": "2"}, 2, ""),  # mpirun may start the torchruns
        (TASK, 2, ""),
        (TASK | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, 2, ""),
        (TASK | {"RANK": "0"}, 2, "RANK=0: set, and no launcher"),
        (TASK | {"PMI_SIZE": "16"}, 2, ""),
        (TASK | {"OMPI_COMM_WORLD_SIZE": "16"}, 2, "OMPI_COMM_WORLD_SIZE=16: mpirun starts"),
        (BATCH, 2, "put `srun` before the command"),
        (BATCH, 4, "Slurm runs 16 tasks, and trainer.devices=8 x"),
        (BATCH | {"SLURM_NTASKS": "1"}, 2, "use --ntasks-per-node=8 --nodes=2"),
        (TASK | {"SLURM_NTASKS_PER_NODE": "4"}, 2, "Slurm runs 4 tasks on each of 2 nodes"),
        (TASK | {"SLURM_NNODES": "4"}, 2, "Slurm runs 8 tasks on each of 4 nodes"),
        (BATCH | {"SLURM_JOB_NAME": "bash"}, 1, ""),
        (BATCH | {"SLURM_JOB_NAME": "interactive"}, 2, "start the job on every node"),
        ({"SLURM_PROCID": "3", "SLURM_JOB_NAME": "bash"}, 1, "SLURM_PROCID=3: set, and no"),
        ({"SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, 1, ""),
        (JSRUN, 2, ""),
        (JSRUN, 4, "jsrun started 16 processes, and trainer.devices=8 x trainer.num_nodes=4"),
        ({"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/r"}, 1, ""),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, 1, "use torchrun or srun"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 1, ""),
        ({"PMI_SIZE": "8"}, 1, "`env -u PMI_SIZE -u PMI_RANK vipllava train ...`"),
        (BY_HAND, 2, ""),
        (BY_HAND | {"WORLD_SIZE": "16"}, 2, ""),
        (BY_HAND | {"WORLD_SIZE": "8"}, 2, "WORLD_SIZE=8: set, and no launcher"),
        (BY_HAND | {"NODE_RANK": "2"}, 2, "NODE_RANK=2: expected 0 to 1"),
        ({"MASTER_ADDR": "10.0.0.1"}, 2, "each node needs MASTER_PORT, NODE_RANK, too"),
        ({"MASTER_ADDR": "192.0.2.1"}, 1, "MASTER_ADDR=192.0.2.1 is no address of this machine"),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, ""),
        ({"MASTER_PORT": "http"}, 1, "MASTER_PORT=http: expected a port's number"),
    ],
)
def test_what_a_launcher_has_started_is_what_the_job_waits_for(
    setenv, variables: dict[str, str], nodes: int, message: str
):
    setenv(variables)
    found = problems(8, nodes)
    assert len(found) == (1 if message else 0), found
    assert message in "".join(found)


def test_a_port_that_is_taken(setenv):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        setenv({"MASTER_PORT": port})
        (found,) = problems(2)
        assert found.startswith(f"MASTER_PORT={port} is taken by another process")
        assert problems(1, strategy="single") == []
    assert problems(2) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (ELASTIC, "torchrun started 16, each of which would write the same files"),
        (ELASTIC | {"WORLD_SIZE": "1"}, ""),
        (TASK, "slurm started 16"),
        (BATCH, ""),  # the batch script itself, of a job with more tasks
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "each would do the whole job"),
    ],
)
def test_an_evaluation_is_one_process(setenv, variables: dict[str, str], message: str):
    setenv(variables)
    found = of_one_process()
    assert len(found) == (1 if message else 0), found
    assert message in "".join(found)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("train.py", ["trainer=cpu"]), ("evaluate.py", ["checkpoint=elsewhere/export"])],
)
def test_the_commands_themselves_refuse(tmp_path: Path, script: str, arguments: list[str]):
    done = preloaded.run(
        [
            *(sys.executable, str(ROOT / script), f"paths.manifests={ROOT / 'data_manifests'}"),
            *arguments,
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "8"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "RANK=0, WORLD_SIZE=8: set, and no launcher has started this process" in done.stderr
    assert f"`env -u RANK -u WORLD_SIZE python {script} ...`" in done.stderr
    assert "Traceback" not in done.stderr
