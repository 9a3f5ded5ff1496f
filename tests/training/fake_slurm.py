"""As much of Slurm as a job notices: `sbatch`, `srun`, `scontrol` and `sacct` on this machine.

All four are this file under other names. A batch script runs in the background, its tasks are
processes with the variables that srun sets, and a job that is queued again starts again when its
script has ended. What happens is noted in the folder that ``FAKE_SLURM`` names.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

JOB_ID = "4242"


def install(folder: Path) -> dict[str, str]:
    """Put the commands into a folder and return the variables with which they are found."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        file = commands / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {name} "$@"\n')
        file.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


def tasks(folder: Path) -> list[int]:
    """Return the processes of the tasks that were started last, in the order of their ranks."""
    file = folder / "tasks"
    return [int(line) for line in file.read_text().split()] if file.is_file() else []


def wait_for_end(folder: Path, within_s: float = 300) -> str:
    """Wait until the job is neither running nor queued; return its exit code."""
    limit = time.monotonic() + within_s
    while not (folder / "ended").is_file():
        assert time.monotonic() < limit, "the job does not end"
        time.sleep(0.05)
    return (folder / "ended").read_text()


def _sbatch(folder: Path, arguments: list[str]) -> int:
    script = next(a for a in arguments if not a.startswith("-"))
    command = [sys.executable, __file__, "run", *arguments]
    log = (folder / "batch.log").open("a")
    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    (folder / "script").write_text(Path(script).read_text())
    print(f"Submitted batch job {JOB_ID}")  # noqa: T201
    return 0


def _run(folder: Path, arguments: list[str]) -> int:
    place = next(i for i, a in enumerate(arguments) if not a.startswith("-"))
    script = Path(arguments[place])
    given = re.findall(r"(?m)^#SBATCH (--.*)$", script.read_text()) + arguments[:place]
    options = dict(re.findall(r"^--([^=]+)=(.*)$", line)[0] for line in given if "=" in line)
    nodes, per_node = int(options.get("nodes", 1)), int(options.get("ntasks-per-node", 1))
    variables = {
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NAME": shlex.split(options.get("job-name", "batch"))[0],
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", "1"),
    }
    restarts = 0
    while True:
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        command = ["bash", *arguments[place:]]
        code = subprocess.call(command, env=os.environ | variables)
        if not (folder / "requeue").is_file():
            break
        (folder / "requeue").unlink()
        restarts += 1
    (folder / "restarts").write_text(str(restarts))
    (folder / "ended").write_text(str(code))
    return 0


def _srun(folder: Path, arguments: list[str]) -> int:
    options: dict[str, str] = {}
    while arguments[0].startswith("-"):
        name, _, value = arguments.pop(0).partition("=")
        if name in ("--output", "--error") and not value:
            value = arguments.pop(0)
        options[name] = value
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
            "SLURM_STEP_ID": "0",
        }
        path = options.get("--output", str(folder / "task-%t.log"))
        path = path.replace("%j", JOB_ID).replace("%A_%a", JOB_ID).replace("%t", str(rank))
        with Path(path).open("a") as log:
            processes.append(
                subprocess.Popen(
                    arguments,
                    env=os.environ | variables,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    (folder / "tasks").write_text(" ".join(str(p.pid) for p in processes))
    # A process that a signal ended counts as 128 and the signal's number.
    codes = [process.wait() for process in processes]
    return max(128 - code if code < 0 else code for code in codes)


def _scontrol(folder: Path, arguments: list[str]) -> int:
    assert arguments == ["requeue", JOB_ID]
    (folder / "requeue").touch()
    return 0


def _sacct(folder: Path, arguments: list[str]) -> int:
    state = "RUNNING"
    if (folder / "ended").is_file():
        state = "COMPLETED" if (folder / "ended").read_text() == "0" else "FAILED"
    print(f"JobID|State|NodeList\n{JOB_ID}|{state}|localhost")  # noqa: T201
    return 0


if __name__ == "__main__":
    commands = {
        "sbatch": _sbatch,
        "run": _run,
        "srun": _srun,
        "scontrol": _scontrol,
        "sacct": _sacct,
    }
    sys.exit(commands[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), sys.argv[2:]))
