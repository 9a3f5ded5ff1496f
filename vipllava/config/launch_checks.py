"""Who started this process, and whether that fits the job; from the environment alone.

Lightning reads ranks from variables of a launcher. These stand in some containers' images, too, and
in a queue's shells: a process that believes them waits for others, or writes beside them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from vipllava.config.schema import JobValues

Launcher = Literal["torchrun", "slurm", "jsrun", "lightning"]

_OWN_CHILD: Final = "hydra.job.name=train_ddp_process_"
"""In the command line of the further processes that Lightning starts on a node."""
_JSRUN: Final = (
    "LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
_ELASTIC: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LEFT_OVER: Final = (
    *_ELASTIC, "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK",
    "JSM_NAMESPACE_SIZE",
)  # fmt: skip
"""What only a launcher sets; Lightning, torch or a run's own restart would believe each."""
_AS_SLURM: Final = {
    "RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS",
    "NODE_RANK": "SLURM_NODEID", "GROUP_RANK": "SLURM_NODEID",
}  # fmt: skip
_MPI_SIZES: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MEETING: Final = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""What a person sets on each node who starts a job there without a launcher."""


def check_launch(job: JobValues) -> Iterator[str]:
    """Yield what keeps a training job from running in the processes that were started."""
    devices, nodes = job.number("trainer.devices"), job.number("trainer.num_nodes")
    if devices is None or nodes is None:
        return
    wanted = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    launcher = find_launcher()
    if launcher == "torchrun":
        yield from _torchrun(devices, nodes, wanted)
    if launcher in ("torchrun", "lightning"):  # the parent of Lightning's own was checked
        return
    by_hand = nodes > 1 and all(os.environ.get(name) for name in _MEETING)
    agreed = ["NODE_RANK"] if by_hand else []
    if by_hand and _int("WORLD_SIZE") == devices * nodes:
        agreed.append("WORLD_SIZE")
    yield from _explain_left_over(agreed)
    if launcher == "slurm":
        yield from _mpi()
        yield from _slurm(devices, nodes, wanted)
    elif launcher == "jsrun":
        size = _int("JSM_NAMESPACE_SIZE")
        if size != devices * nodes:
            yield f"jsrun started {size} processes, and {wanted}: they must agree"
    else:
        if by_hand and _int("NODE_RANK", -1) not in range(nodes):
            number = os.environ["NODE_RANK"]
            yield f"NODE_RANK={number}: expected 0 to {nodes - 1}, as trainer.num_nodes says"
        if nodes > 1 and not by_hand:
            missing = ", ".join(name for name in _MEETING if not os.environ.get(name))
            yield (
                f"trainer.num_nodes={nodes}: start the job on every node with torchrun, or with "
                "srun; started alone, this process would wait for the others for ever (without a "
                f"launcher each node needs {missing}, too)"
            )
        if not by_hand:
            yield from _mpi()
        if job.get("strategy.name", str) != "single":
            yield from _find_meeting_problems(nodes)


def check_single_process(job: JobValues) -> Iterator[str]:
    """Yield what is wrong where a program is one process and several were started."""
    launcher = find_launcher()
    sizes = {"torchrun": "WORLD_SIZE", "jsrun": "JSM_NAMESPACE_SIZE"}
    if launcher == "slurm" and _is_task():
        sizes["slurm"] = "SLURM_NTASKS"
    started = _int(sizes[launcher]) if launcher in sizes else 1
    if started != 1:
        names = [n for n in ("TORCHELASTIC_RUN_ID", *_ELASTIC) if n in os.environ]
        remedy = f"; if it did not: `{_unset(names)}`" if launcher == "torchrun" else ""
        yield (
            f"evaluate.py is one process, and {launcher} started {started}, each of which would "
            f"write the same files: start it once{remedy}"
        )
    elif launcher != "torchrun":
        yield from _explain_left_over()
        yield from _mpi()


def find_launcher() -> Launcher | None:
    """Return what started this process, in the order in which Lightning asks; None: nothing did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # In a shell on a node Lightning starts the processes itself, as without Slurm.
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in os.environ and not shell:
        return "slurm"
    if set(_JSRUN) <= set(os.environ):
        return "jsrun"
    if "LOCAL_RANK" in os.environ and any(a.startswith(_OWN_CHILD) for a in sys.argv[1:]):
        return "lightning"
    return None


def left_over(ignored: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables, but for ``ignored``, that only a launcher sets and none of now has."""
    launcher, env = find_launcher(), os.environ
    if launcher in ("torchrun", "lightning"):
        return {}
    fine = {*ignored}
    if launcher == "slurm":  # scripts that spell out the ranks of its own task are right
        fine |= {name for name, slurms in _AS_SLURM.items() if env.get(name) == env.get(slurms)}
    if launcher == "jsrun":
        fine |= {name for name in _LEFT_OVER if name.startswith("JSM_")}
    names = [name for name in _LEFT_OVER if name in env and name not in fine]
    if launcher is None and _int("SLURM_PROCID"):
        names.append("SLURM_PROCID")  # a task of several, under the name of a shell
    return {name: env[name] for name in names}


def misplaced_master() -> str | None:
    """Return ``MASTER_ADDR`` if it is set and is no address of this machine."""
    address = os.environ.get("MASTER_ADDR")
    return None if address is None or _is_here(address) else address


def unset_command(names: Iterable[str], command: str) -> str:
    """Return a command without variables, e.g. ``env -u RANK python train.py``."""
    return " ".join(["env", *(f"-u {name}" for name in names), command])


def _explain_left_over(ignored: Iterable[str] = ()) -> Iterator[str]:
    if found := left_over(ignored):
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        yield (
            f"{listed}: set, and no launcher has started this process (a container's image, a "
            "notebook or a shell may have left it over), which would take itself for one of "
            f"several: start it with `{_unset(found)}`, or with torchrun or srun"
        )


def _unset(names: Iterable[str]) -> str:
    script = Path(sys.argv[0]).name
    if script in ("train.py", "evaluate.py"):
        return unset_command(names, f"python {script} ...")
    command = "evaluate" if sys.argv[1:2] == ["evaluate"] else "train"
    return unset_command(names, f"vipllava {command} ...")


def _torchrun(devices: int, nodes: int, wanted: str) -> Iterator[str]:
    names = ("TORCHELASTIC_RUN_ID", *(n for n in _ELASTIC if n in os.environ))
    otherwise = f"; if torchrun did not start this process: `{_unset(names)}`"
    here, world = _int("LOCAL_WORLD_SIZE"), _int("WORLD_SIZE")
    rank, local_rank = os.environ.get("RANK"), os.environ.get("LOCAL_RANK")
    if (here, world) != (devices, devices * nodes):
        yield (
            f"torchrun started {here} processes here and {world} in all, and {wanted}: use "
            f"--nproc-per-node={devices} --nnodes={nodes}, or other numbers for the trainer"
            f"{otherwise}"
        )
    elif _int("RANK", -1) not in range(world) or _int("LOCAL_RANK", -1) not in range(here):
        yield (
            f"TORCHELASTIC_RUN_ID is set, and RANK={rank} LOCAL_RANK={local_rank} are none of "
            f"{world} processes in all, {here} here{otherwise}"
        )


def _slurm(devices: int, nodes: int, wanted: str) -> Iterator[str]:
    """How many tasks Slurm has, against how many the job waits for."""
    tasks = _int("SLURM_NTASKS")
    use = f"use --ntasks-per-node={devices} --nodes={nodes}"
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE")
    on = os.environ.get("SLURM_NNODES", str(nodes))
    if tasks != devices * nodes:
        yield (
            f"Slurm runs {tasks} task{'s' if tasks > 1 else ''}, and {wanted}: {use}, or other "
            "numbers for the trainer"
        )
    elif tasks == 1:
        return
    elif not _is_task():
        yield (
            f"Slurm has room for {tasks} tasks, and one was started, which would wait for the "
            "others for ever: put `srun` before the command (docs/slurm_job.sh)"
        )
    elif per_node is None:
        yield f"Slurm runs {tasks} tasks by --ntasks, which Lightning does not read: {use}"
    elif (per_node, on) != (str(devices), str(nodes)):
        yield f"Slurm runs {per_node} tasks on each of {on} nodes, and {wanted}: {use}"


def _is_task() -> bool:
    """Return whether srun started this process, and not the batch script itself."""
    return bool({"SLURM_STEP_ID", "SLURM_STEPID"} & set(os.environ))


def _mpi() -> Iterator[str]:
    slurms_own = "PMI_SIZE" if find_launcher() == "slurm" else None
    name = next((name for name in _MPI_SIZES if _int(name) > 1 and name != slurms_own), None)
    if name:
        yield (
            f"{name}={os.environ[name]}: mpirun starts processes that do not know each other here, "
            "and each would do the whole job: use torchrun or srun; if it did not start this one: "
            f"`{_unset([name, name.replace('SIZE', 'RANK')])}`"
        )


def _find_meeting_problems(nodes: int) -> Iterator[str]:
    """Where the processes of this node would look for each other."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if nodes == 1 and (misplaced := misplaced_master()):
        yield (
            f"MASTER_ADDR={misplaced} is no address of this machine, and its processes would look "
            f"for each other there: `{_unset(['MASTER_ADDR'])}`"
        )
    elif port is None:
        return
    elif not port.isdecimal() or not 0 < int(port) < 2**16:
        yield f"MASTER_PORT={port}: expected a port's number; `{_unset(['MASTER_PORT'])}`"
    elif (
        _int("NODE_RANK") == 0
        and (address is None or _is_here(address))
        and not _can_bind(socket.AF_INET, ("", int(port)))
    ):
        remedy = f"set another, or `{_unset(['MASTER_PORT'])}`"
        yield f"MASTER_PORT={port} is taken by another process: {remedy}"


def _is_here(address: str) -> bool:
    """Return whether an address or a host's name is this machine's: only those can be bound."""
    try:
        found = socket.getaddrinfo(address or "-", 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_can_bind(family, where) for family, _, _, _, where in found)


def _can_bind(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(address)
    except OSError:
        return False
    return True


def _int(variable: str, otherwise: int = 0) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise
