"""Whether two processes of this machine can add up a tensor, within a bounded time.

This file is also what the two processes run, by its path: it imports nothing of the package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

PROCESSES = 2
_NUMBERS = 1 << 20
"""Long enough that NCCL moves it as it moves gradients."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of it."""

    backend: str  # ``nccl`` (one CUDA device for each process) or ``gloo``
    seconds: float  # from start to end, imports included
    error: str = ""  # what went wrong, in one line; empty if nothing did


def probe_network(backend: str, timeout: float = 60.0, *, script: Path = Path(__file__)) -> Probe:
    """Start two processes that add up a tensor; none of them outlives this call.

    Args:
        backend: ``nccl`` or ``gloo``.
        timeout: seconds after which it counts as failed.
        script: what the processes run; this file.
    """
    began, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder:
        children: list[subprocess.Popen[bytes]] = []
        logs = [Path(folder, f"{rank}.txt") for rank in range(PROCESSES)]
        try:
            for rank, log in enumerate(logs):
                words = (str(script), str(rank), backend, folder, str(timeout))
                with log.open("wb") as out:
                    # -P: this folder holds modules with the names of Python's own.
                    command = [sys.executable, "-P", *words]
                    children.append(subprocess.Popen(command, stdout=out, stderr=out))
            codes: list[int | None] = [None]
            while None in codes and not any(codes):
                if time.monotonic() - began > timeout:
                    error = f"no answer within {timeout:g} s"
                    break
                time.sleep(0.05)
                codes = [child.poll() for child in children]
            for rank, code in enumerate(codes):
                if code:
                    said = logs[rank].read_text("utf-8", errors="replace").strip()
                    error = said.split("\n")[-1] or f"process {rank} ended with code {code}"
        finally:
            for child in children:
                child.kill()
                child.wait()
    return Probe(backend, time.monotonic() - began, error)


def _add_up(rank: int, backend: str, folder: str, timeout: float) -> None:
    import torch
    from torch import distributed

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=timeout),
    )
    numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
    distributed.all_reduce(numbers)
    if not bool((numbers == sum(range(1, PROCESSES + 1))).all()):
        sys.exit("the sum is wrong")
    distributed.destroy_process_group()


if __name__ == "__main__":
    _add_up(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
