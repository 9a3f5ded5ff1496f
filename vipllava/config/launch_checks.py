"""Who started this process, and whether that fits the job; from the environment alone."""

from __future__ import annotations

import os

from vipllava.config.job_values import JobValues

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "NODE_RANK")


def check_launch(job: JobValues) -> list[str]:
    """Return what keeps the job from running in the processes that were started."""
    return _nodes(job) + _processes(job)


def _nodes(job: JobValues) -> list[str]:
    nodes = job.number("trainer.num_nodes")
    if nodes is None or nodes == 1 or any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return []
    return [
        f"trainer.num_nodes={nodes}: start the job on every node with torchrun, or with srun; "
        "started alone, this process would wait for the others for ever"
    ]


def _processes(job: JobValues) -> list[str]:
    """How many processes torchrun or Slurm has started, against how many the job waits for."""
    devices, nodes = job.number("trainer.devices"), job.number("trainer.num_nodes")
    if devices is None or nodes is None:
        return []
    wanted = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        here, world = _int("LOCAL_WORLD_SIZE"), _int("WORLD_SIZE")
        if (here, world) == (devices, devices * nodes):
            return []
        return [
            f"torchrun started {here} processes here and {world} in all, and {wanted}: use "
            f"--nproc-per-node={devices} --nnodes={nodes}, or other numbers for the trainer"
        ]
    tasks = _int("SLURM_NTASKS")
    # In a shell on a node Lightning starts the processes itself, as without Slurm.
    if not tasks or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return []
    if tasks != devices * nodes:
        return [
            f"Slurm runs {tasks} task{'s' if tasks > 1 else ''}, and {wanted}: use "
            f"--ntasks-per-node={devices} --nodes={nodes}, or other numbers for the trainer"
        ]
    if tasks > 1 and not {"SLURM_STEP_ID", "SLURM_STEPID"} & set(environment):
        return [
            f"Slurm has room for {tasks} tasks, and one was started, which would wait for the "
            "others for ever: put `srun` before the command (docs/slurm_job.sh)"
        ]
    return []


def _int(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
