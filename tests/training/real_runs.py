"""train.py as a user starts it, on the tiny model: processes to be signalled and killed."""

from __future__ import annotations

import csv
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from tests import preloaded
from tests.toy_data import toy_samples
from vipllava.shards.tars import write_shards

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 60


def write_data(root: Path) -> Path:
    """Write 24 samples and their manifest; three global batches of eight an epoch."""
    write_shards(toy_samples(24), root / "mine", max_samples=8)
    (root / "mine.yaml").write_text(
        "schema_version: 2\nname: mine\nstage: pretrain\nlicence: none\nshards: mine/*.tar\n"
    )
    return root


class Run:
    """One start of the command, 60 steps, in a session of its own; the same folder goes on.

    Two processes, or one where the strategy is ``auto``. A terminal becomes that of the session.
    ``ranks_import``: the second process starts as it would for a user, in an interpreter.
    """

    def __init__(
        self,
        data_root: Path,
        name: str,
        strategy: str,
        *more: str,
        terminal: int | None = None,
        ranks_import: bool = False,
    ) -> None:
        self.folder = data_root / "runs" / name
        devices = 1 if strategy == "auto" else 2
        command = [
            *(sys.executable, str(ROOT / "train.py"), "stage=pretrain", "model=tiny"),
            *("trainer=cpu", f"trainer.devices={devices}", f"strategy={strategy}"),
            *("callbacks=quiet", f"data.manifest={data_root / 'mine.yaml'}"),
            *(f"paths.data_root={data_root}", f"paths.runs={data_root / 'runs'}"),
            *(f"paths.manifests={ROOT / 'data_manifests'}", f"name={name}"),
            *("stage.global_batch_size=8", "machine.micro_batch_size=4"),
            *("stage.epochs=20", "stage.checkpoint_steps=3", "machine.num_workers=0"),
            *more,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = preloaded.Popen(
            command,
            cwd=data_root,
            env=environment,
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            start_new_session=True,
            nested=devices > 1 and not ranks_import,
            preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        _RUNNING.add(self)

    def end(self, within_s: float = 240) -> int:
        """Wait until no process holds the error stream any more; return rank 0's exit code."""
        try:
            _, self.stderr = self.process.communicate(timeout=within_s)
        except BaseException:
            self.kill()
            raise
        _RUNNING.discard(self)
        return self.process.returncode

    def kill(self) -> None:
        """Kill all processes and wait for the first one; those that are gone are no error."""
        with suppress(ProcessLookupError):
            self.signal_all(signal.SIGKILL)
        self.process.communicate(timeout=BOUND_S)
        _RUNNING.discard(self)

    def wait_for(self, seen: Callable[[], bool], within_s: float = 240) -> None:
        limit = time.monotonic() + within_s
        while not seen():
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < limit, "the run does not come so far"
            time.sleep(0.002)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of rank 0 and rank 1."""
        ranks = [psutil.Process(self.process.pid)]
        for child in ranks[0].children():
            with suppress(psutil.NoSuchProcess):  # others come and go
                # A process that loads data is a copy of its rank.
                if "hydra.job.name" in " ".join(child.cmdline()):
                    ranks.append(child)
        return ranks

    def processes(self) -> list[psutil.Process]:
        """Return whatever runs of this start, known to its parent or not."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self.process.pid
                mine = mine and "tests.preloaded" not in process.cmdline()
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """Signal all processes at once, as terminals and queues do."""
        os.killpg(self.process.pid, number)

    def rows(self) -> dict[int, float]:
        path = self.folder / "csv" / "metrics.csv"
        if not path.is_file():
            return {}
        with path.open(newline="") as file:
            return {int(r["step"]): float(r["train/loss"]) for r in csv.DictReader(file)}

    def checkpoints(self) -> list[int]:
        """Return the steps of the whole checkpoints."""
        names = (self.folder / "checkpoints").glob("*.ckpt")
        return sorted(int(path.stem) for path in names)


def kill_left_runs() -> None:
    """Kill what a test that failed has left."""
    for run in list(_RUNNING):
        run.kill()


_RUNNING: Final[set[Run]] = set()


def wait_until_gone(run: Run) -> None:
    """Fail unless no process runs any more within the bound; nobody may be there to reap it."""
    limit = time.monotonic() + BOUND_S
    while left := run.processes():
        if time.monotonic() > limit:
            run.signal_all(signal.SIGKILL)
            raise AssertionError(f"{left} still run")
        time.sleep(0.1)
