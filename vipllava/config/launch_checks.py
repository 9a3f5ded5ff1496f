"""Who started this process, and whether that fits the job; from the environment alone.

Lightning reads ranks from variables that a launcher sets. The same variables stand in some
containers' images, in notebooks that a launcher started and in the shells of a queue: a process
that believes them takes itself for one of several, and waits for the others or writes beside them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from vipllava.config.job_values import JobValues

Launcher = Literal["torchrun", "slurm", "jsrun", "lightning"]

_OWN_CHILD: Final = "hydra.job.name=train_ddp_process_"
"""In the command line of the further processes that Lightning starts on a node."""
_JSRUN: Final = (
    "LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
_ELASTIC: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LEFT_OVER: Final = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
    "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
"""What only a launcher sets; Lightning, torch or a run's own restart would believe each."""
_MPI_SIZES: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MEETING: Final = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""What a person sets on each node who starts a job there without a launcher."""


def check_launch(job: JobValues) -> list[str]:
    """Return what keeps a training job from running in the processes that were started."""
    devices, nodes = job.number("trainer.devices"), job.number("trainer.num_nodes")
    if devices is None or nodes is None:
        return []
    wanted = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    launcher = find_launcher()
    if launcher == "torchrun":
        return _torchrun(devices, nodes, wanted)
    if launcher == "lightning":
        return []  # its parent was checked
    by_hand = nodes > 1 and all(os.environ.get(name) for name in _MEETING)
    agreed = ["NODE_RANK"] if by_hand else []
    if by_hand and _int("WORLD_SIZE") == devices * nodes:
        agreed.append("WORLD_SIZE")
    problems = _explain_left_over(left_over(ignored=agreed))
    if launcher == "slurm":
        return problems + _mpi() + _slurm(devices, nodes, wanted)
    if launcher == "jsrun":
        size = _int("JSM_NAMESPACE_SIZE")
        if size != devices * nodes:
            problems.append(f"jsrun started {size} processes, and {wanted}: they must agree")
        return problems
    if by_hand and (_int("NODE_RANK", -1) not in range(nodes)):
        number = os.environ["NODE_RANK"]
        problems.append(f"NODE_RANK={number}: expected 0 to {nodes - 1}, as trainer.num_nodes says")
    if nodes > 1 and not by_hand:
        missing = ", ".join(name for name in _MEETING if not os.environ.get(name))
        problems.append(
            f"trainer.num_nodes={nodes}: start the job on every node with torchrun, or with srun; "
            "started alone, this process would wait for the others for ever (without a launcher "
            f"each node needs {missing}, too)"
        )
    if not by_hand:
        problems += _mpi()
    if job.get("strategy.name", str) != "single":
        problems += _find_meeting_problems(nodes)
    return problems


def check_single_process(job: JobValues) -> list[str]:
    """Return what is wrong where a program is one process and several were started."""
    launcher = find_launcher()
    started = {
        "torchrun": _int("WORLD_SIZE"),
        "slurm": _int("SLURM_NTASKS") if _is_task() else 1,
        "jsrun": _int("JSM_NAMESPACE_SIZE"),
    }.get(launcher or "", 1)
    if started != 1:
        names = [n for n in ("TORCHELASTIC_RUN_ID", *_ELASTIC) if n in os.environ]
        remedy = f"; if it did not: `{_unset(names)}`" if launcher == "torchrun" else ""
        return [
            f"evaluate.py is one process, and {launcher} started {started}, each of which would "
            f"write the same files: start it once{remedy}"
        ]
    if launcher == "torchrun":
        return []
    return _explain_left_over(left_over()) + _mpi()


def find_launcher(
    environment: Mapping[str, str] | None = None, arguments: Iterable[str] | None = None
) -> Launcher | None:
    """Return what started this process, in the order in which Lightning asks; None: nothing did.

    Args:
        environment: that of this process if not given.
        arguments: of this process's command line if not given.
    """
    environment = os.environ if environment is None else environment
    arguments = sys.argv[1:] if arguments is None else arguments
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    # In a shell on a node Lightning starts the processes itself, as without Slurm.
    shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environment and not shell:
        return "slurm"
    if set(_JSRUN) <= set(environment):
        return "jsrun"
    if "LOCAL_RANK" in environment and any(a.startswith(_OWN_CHILD) for a in arguments):
        return "lightning"
    return None


def left_over(*, ignored: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that only a launcher sets, and that none of now has set.

    Args:
        ignored: names that are fine in this job.
    """
    launcher = find_launcher()
    if launcher in ("torchrun", "lightning"):
        return {}
    names = [name for name in _LEFT_OVER if name in os.environ and name not in ignored]
    if launcher == "slurm":  # scripts that spell out the task's own ranks are right
        same = {
            "RANK": "SLURM_PROCID",
            "LOCAL_RANK": "SLURM_LOCALID",
            "WORLD_SIZE": "SLURM_NTASKS",
            "NODE_RANK": "SLURM_NODEID",
            "GROUP_RANK": "SLURM_NODEID",
        }
        names = [
            name
            for name in names
            if name not in same or os.environ[name] != os.environ.get(same[name])
        ]
    if launcher == "jsrun":
        names = [name for name in names if not name.startswith("JSM_")]
    if launcher is None and _int("SLURM_PROCID"):
        names.append("SLURM_PROCID")  # a task of several, under the name of a shell
    return {name: os.environ[name] for name in names}


def misplaced_master() -> str | None:
    """Return ``MASTER_ADDR`` if it is set and is no address of this machine."""
    address = os.environ.get("MASTER_ADDR")
    return None if address is None or _is_here(address) else address


def unset_command(names: Iterable[str], command: str) -> str:
    """Return a command without variables, e.g. ``env -u RANK python train.py``."""
    return " ".join(["env", *(f"-u {name}" for name in names), command])


def _explain_left_over(found: Mapping[str, str]) -> list[str]:
    if not found:
        return []
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    return [
        f"{listed}: set, and no launcher has started this process (a container's image, a notebook "
        "or a shell may have left it over), which would take itself for one of several: start it "
        f"with `{_unset(found)}`, or with torchrun or srun"
    ]


def _unset(names: Iterable[str]) -> str:
    script = Path(sys.argv[0]).name
    name = script if script in ("train.py", "evaluate.py") else "train.py"
    return unset_command(names, f"python {name} ...")


def _torchrun(devices: int, nodes: int, wanted: str) -> list[str]:
    names = ("TORCHELASTIC_RUN_ID", *(n for n in _ELASTIC if n in os.environ))
    otherwise = f"; if torchrun did not start this process: `{_unset(names)}`"
    here, world = _int("LOCAL_WORLD_SIZE"), _int("WORLD_SIZE")
    if (here, world) != (devices, devices * nodes):
        return [
            f"torchrun started {here} processes here and {world} in all, and {wanted}: use "
            f"--nproc-per-node={devices} --nnodes={nodes}, or other numbers for the trainer"
            + otherwise
        ]
    rank, local = _int("RANK", -1), _int("LOCAL_RANK", -1)
    if rank not in range(world) or local not in range(here):
        return [
            f"TORCHELASTIC_RUN_ID is set, and RANK={os.environ.get('RANK')} LOCAL_RANK="
            f"{os.environ.get('LOCAL_RANK')} are none of {world} processes in all, {here} here"
            + otherwise
        ]
    return []


def _slurm(devices: int, nodes: int, wanted: str) -> list[str]:
    """How many tasks Slurm has, against how many the job waits for."""
    tasks = _int("SLURM_NTASKS")
    use = f"use --ntasks-per-node={devices} --nodes={nodes}"
    if tasks != devices * nodes:
        return [
            f"Slurm runs {tasks} task{'s' if tasks > 1 else ''}, and {wanted}: {use}, or other "
            "numbers for the trainer"
        ]
    if tasks == 1:
        return []
    if not _is_task():
        return [
            f"Slurm has room for {tasks} tasks, and one was started, which would wait for the "
            "others for ever: put `srun` before the command (docs/slurm_job.sh)"
        ]
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE")
    on = os.environ.get("SLURM_NNODES", str(nodes))
    if per_node is None:
        return [f"Slurm runs {tasks} tasks by --ntasks, which Lightning does not read: {use}"]
    if (per_node, on) != (str(devices), str(nodes)):
        return [f"Slurm runs {per_node} tasks on each of {on} nodes, and {wanted}: {use}"]
    return []


def _is_task() -> bool:
    """Return whether srun started this process, and not the batch script itself."""
    return bool({"SLURM_STEP_ID", "SLURM_STEPID"} & set(os.environ))


def _mpi() -> list[str]:
    for name in _MPI_SIZES:
        slurms_own = name == "PMI_SIZE" and find_launcher() == "slurm"
        if _int(name) > 1 and not slurms_own:
            rank = name.replace("SIZE", "RANK")
            return [
                f"{name}={os.environ[name]}: mpirun starts processes that do not know each other "
                "here, and each would do the whole job: use torchrun or srun; if it did not start "
                f"this one: `{_unset([name, rank])}`"
            ]
    return []


def _find_meeting_problems(nodes: int) -> list[str]:
    """Where the processes of this node would look for each other."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if nodes == 1 and (misplaced := misplaced_master()):
        return [
            f"MASTER_ADDR={misplaced} is no address of this machine, and its processes would look "
            f"for each other there: `{_unset(['MASTER_ADDR'])}`"
        ]
    if port is None:
        return []
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        return [f"MASTER_PORT={port}: expected a port's number; `{_unset(['MASTER_PORT'])}`"]
    binds = _int("NODE_RANK") == 0 and (address is None or _is_here(address))
    if binds and not _is_free(int(port)):
        return [
            f"MASTER_PORT={port} is taken by another process: set another, or "
            f"`{_unset(['MASTER_PORT'])}`"
        ]
    return []


def _is_here(address: str) -> bool:
    """Return whether an address or a host's name is this machine's: only those can be bound."""
    try:
        found = socket.getaddrinfo(address or "-", 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, where in found:
        try:
            with socket.socket(family, kind) as test:
                test.bind(where)
        except OSError:
            continue
        return True
    return False


def _is_free(port: int) -> bool:
    try:
        with socket.socket() as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(("", port))
    except OSError:
        return False
    return True


def _int(variable: str, otherwise: int = 0) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise
