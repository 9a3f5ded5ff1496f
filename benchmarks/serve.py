"""Requests per second of `vipllava serve` with the tiny model, by how many clients ask at once.

A real server in a process of its own; clients in this one stream their answers over HTTP and ask
again when one is whole. One, eight and 32 of them take turns in every round: ``ratio`` is to one
client, who waits for each answer before the next question, the median of the rounds' own. ``first``
is the time until the first text, ``whole`` until the last. No picture is asked about twice, so
nothing is answered from a cache.

``short`` has answers of two tokens, ``long`` of 32, ``mix`` half of each.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from benchmarks import soak
from benchmarks.served import (
    Body,
    Heard,
    Served,
    hear,
    name_of,
    open_session,
    questions,
    save_talkative,
    served,
    to_stream,
)
from vipllava.sample_world.build import ensure_sample_world

CLIENTS: Final = (1, 8, 32)
WORKLOADS: Final = ("short", "long", "mix")
SHORT, LONG = 2, 32  # tokens
_ROUNDS: Final = 5
_REQUESTS: Final = {1: 32, 8: 64, 32: 192}
"""Of one measurement, by clients."""


def run(
    data_root: Path = Path("data"), checkpoint: Path | None = None, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """Measure.

    Args:
        data_root: where the sample world is, or is made.
        checkpoint: an export, whose answers end when it ends them; None takes one of the same size
            whose answers are as long as they may be.
        rounds: measured ones.
    """
    ensure_sample_world(data_root)
    with model_to_serve(checkpoint) as model, served(model) as server:
        rows = asyncio.run(measure(server, data_root, rounds))
    return {"rows": rows, "checkpoint": checkpoint and str(checkpoint)}


@contextmanager
def model_to_serve(checkpoint: Path | None) -> Iterator[Path]:
    """Return the named export, or make one for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        yield checkpoint or save_talkative(Path(folder) / "tiny")


async def measure(server: Served, data_root: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each workload and number of clients."""
    name = await asyncio.to_thread(name_of, server)
    number = sum(_REQUESTS.values()) * (rounds + 1)
    bodies = {
        workload: _bodies(workload, data_root, number, name, first=number * place)
        for place, workload in enumerate(WORKLOADS)
    }
    heard: dict[tuple[str, int], list[Heard]] = {}
    speeds: dict[tuple[str, int], list[float]] = {}
    for round_number in range(rounds + 1):  # the first one warms up
        for workload in WORKLOADS:
            for clients in CLIENTS:
                asked = [next(bodies[workload]) for _ in range(_REQUESTS[clients])]
                began = time.perf_counter()
                found = await ask_all(server, asked, clients)
                seconds = time.perf_counter() - began
                if round_number:
                    heard.setdefault((workload, clients), []).extend(found)
                    speeds.setdefault((workload, clients), []).append(len(found) / seconds)
    return [
        _row(workload, clients, heard[workload, clients], speeds[workload, clients],
             speeds[workload, CLIENTS[0]])
        for workload, clients in speeds
    ]  # fmt: skip


def _bodies(
    workload: str, data_root: Path, number: int, name: str, first: int = 0
) -> Iterator[bytes]:
    short, long = (
        questions(data_root, number, max_tokens=tokens, caption=tokens == LONG, first=first)
        for tokens in (SHORT, LONG)
    )
    chosen: list[Body] = {
        "short": short,
        "long": long,
        "mix": [(short, long)[n % 2][n] for n in range(number)],
    }[workload]
    for body in chosen:
        yield to_stream(body | {"model": name})


async def ask_all(server: Served, bodies: Sequence[bytes], clients: int) -> list[Heard]:
    """Have so many clients ask all of it, each its next question when it has its answer.

    Raises:
        RuntimeError: an answer was refused or broke off.
    """
    waiting, heard = iter(bodies), list[Heard]()

    async def ask() -> None:
        for body in waiting:
            found = await hear(session, body)
            if found.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"no whole answer: {found}")
            heard.append(found)

    async with open_session(server.address) as session, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())
    return heard


def _row(
    workload: str,
    clients: int,
    heard: Sequence[Heard],
    speeds: Sequence[float],
    alone: Sequence[float],
) -> dict[str, Any]:
    def at(seconds: list[float]) -> tuple[float, float]:
        cuts = quantiles(seconds, n=20)
        return 1000 * cuts[9], 1000 * cuts[18]

    first, whole = at([each.first_s for each in heard]), at([each.whole_s for each in heard])
    ratios = sorted(one / other for one, other in zip(speeds, alone, strict=True))
    return {
        "answers": workload,
        "clients": clients,
        "requests_per_s": median(speeds),
        "ratio": median(ratios),
        "ratios": " ".join(f"{ratio:.2f}" for ratio in ratios),
        "first_p50_ms": first[0],
        "first_p95_ms": first[1],
        "whole_p50_ms": whole[0],
        "whole_p95_ms": whole[1],
        "tokens": sum(each.tokens for each in heard) / len(heard),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak a server and print what happened; 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=soak.__doc__)
    parser.add_argument("--soak-minutes", type=float, required=True, metavar="MINUTES")
    parser.add_argument("--clients", type=int, default=soak.CLIENTS)
    parser.add_argument("--checkpoint", type=Path, metavar="EXPORT")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    options = parser.parse_args(arguments)
    ensure_sample_world(options.data_root)
    with model_to_serve(options.checkpoint) as model, served(model) as server:
        found = asyncio.run(
            soak.soak(server, options.data_root, 60 * options.soak_minutes, clients=options.clients)
        )
    for name, value in found.row().items():
        sys.stdout.write(f"{name:>14}  {value:.4g}\n")
    for fault in found.faults[:20]:
        sys.stderr.write(f"{fault}\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
