"""Starting a job on several real processes, as torchrun does."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]


@cache
def _extensions() -> str:
    """Return a folder for DeepSpeed's kernels, which take longer to compile than a test to run."""
    folder = tempfile.mkdtemp(prefix="deepspeed-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start(job: Any, num_processes: int) -> Path:
    """Run a job on real processes, which all have to end well, and return its folder."""
    ends = run(job, num_processes)
    codes = [code for code, _ in ends]
    assert codes == [0] * num_processes, "\n".join(output[-3000:] for _, output in ends)
    return Path(job.folder)


def run(job: Any, num_processes: int) -> list[tuple[int, str]]:
    """Run a job on real processes and return the exit code and output of each."""
    folder = Path(job.folder)
    folder.mkdir()
    job.write(folder / "job.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Of these tests alone: a killed build leaves a lock that others wait for.
            "TORCH_EXTENSIONS_DIR": _extensions(),
        }
        if num_processes > 1:
            environment |= {
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
            }
        processes.append(
            preloaded.Popen(
                [sys.executable, "-m", type(job).__module__, str(folder / "job.json")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    return list(zip(codes, outputs, strict=True))
