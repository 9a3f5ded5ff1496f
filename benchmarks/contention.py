"""Training steps beside another busy process, over those alone, in one run.

The tiny model's stage 2 on the CPU. ``project`` has threads and waits for them as our programs do
(:func:`vipllava.processes.compute_on_cpu`), ``openmp`` as OpenMP does by itself: threads
that are done spin, and keep a core that the thread they wait for, or another process, wants.
``ratio`` is the speed beside a process that spins over the speed alone, the median of the rounds'
own: a round's two are seconds apart, rounds minutes. ``alone`` also tells what waiting costs where
nobody is in the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import cycle
from statistics import median
from typing import Any, Final

WAYS: Final = ("project", "openmp")
_ROUNDS: Final = 7
_STEPS: Final = 6  # of a round; one goes before, unmeasured
_WORKER: Final = "import sys; from benchmarks.contention import work; work(sys.argv[1])"
_SPIN: Final = "while True: pass"


def run(rounds: int = _ROUNDS) -> dict[str, Any]:
    """Measure both ways in turns, alone and beside a spinning process."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_WAIT", "GOMP_"))}
    workers = {
        way: subprocess.Popen(
            [sys.executable, "-c", _WORKER, way],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in WAYS
    }
    speeds: dict[tuple[str, bool], list[float]] = {}
    try:
        for _ in range(rounds):
            for way, worker in workers.items():
                for beside in (False, True):
                    speeds.setdefault((way, beside), []).append(_ask(worker, beside))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        alone, beside = (speeds[way, busy] for busy in (False, True))
        ratios = [one / other for one, other in zip(beside, alone, strict=True)]
        rows.append(
            {
                "waits": way,
                "alone": median(alone),
                "beside": median(beside),
                "ratio": median(ratios),
                "ratios": " ".join(f"{r:.2f}" for r in sorted(ratios)),
            }
        )
    return {"rows": rows, "cores": os.cpu_count()}


def _ask(worker: subprocess.Popen[str], beside: bool) -> float:
    """Return a worker's samples per second in some steps."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    other = subprocess.Popen([sys.executable, "-c", _SPIN]) if beside else None
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())
    finally:
        if other is not None:
            other.kill()
            other.wait()


def work(way: str) -> None:
    """Train some steps for every line of the standard input, and print samples per second."""
    if way == "project":
        from vipllava.processes import begin, compute_on_cpu

        begin()
        compute_on_cpu()
    from pathlib import Path

    from benchmarks.train import batches, our_loss
    from benchmarks.train_cases import tiny_case
    from vipllava.models.freezing import modules_of
    from vipllava.training.optim import OptimizerSettings, build_optimizer, parameter_groups

    case = tiny_case("full", Path("data"))
    model = case.network()
    settings = OptimizerSettings(learning_rate=1e-5)
    groups = parameter_groups(modules_of(model), settings)
    optimizer = build_optimizer(groups, settings, fused=False)
    steps = cycle(batches(case, "padded"))

    def step() -> int:
        batch = next(steps)
        optimizer.zero_grad()
        our_loss(model, batch).backward()
        optimizer.step()
        return len(batch.keys)

    for _ in sys.stdin:
        step()
        began = time.perf_counter()
        count = sum(step() for _ in range(_STEPS))
        sys.stdout.write(f"{count / (time.perf_counter() - began)}\n")
        sys.stdout.flush()
