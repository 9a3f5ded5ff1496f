"""How much memory a process of several comes to hold while its network is built under ZeRO-3.

Started as ``python -m tests.training.loading_job JOB.json`` with the variables of torchrun.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.rank_jobs import RankJob, make_cpu_trainer, read_job


@dataclass(frozen=True)
class Job(RankJob):
    """What to build; each process leaves ``RANK.json`` in the folder."""

    folder: str
    spec: dict[str, Any]


class Built(Exception):
    """The network is there, and no engine yet."""


def main(path: str) -> None:
    job = Job(**read_job(path))

    from tests.training.sharded_job import make_sharded_strategy
    from tests.training.toy_training import Loader, make_samples
    from vipllava.checkpoints.loading import load_tokenizer
    from vipllava.models.building import ModelSpec
    from vipllava.models.freezing import whole_shape
    from vipllava.training.lit_module import VipLlavaLitModule
    from vipllava.training.optim import OptimizerSettings

    class Measured(VipLlavaLitModule):
        def configure_model(self) -> None:
            before = _private_bytes()
            with _Peak() as peak:
                super().configure_model()
            facts = {
                "peak": peak.value - before,
                "whole": sum(4 * math.prod(whole_shape(p)) for p in self.network.parameters()),
            }
            (Path(job.folder) / f"{self.trainer.global_rank}.json").write_text(json.dumps(facts))
            raise Built

    spec = ModelSpec(**job.spec)
    trainer = make_cpu_trainer(
        job.folder,
        devices=2,
        strategy=make_sharded_strategy("zero3"),
        max_epochs=1,
    )
    module = Measured(spec, ["projector"], OptimizerSettings(1e-3), tokenizer=load_tokenizer(spec))
    try:
        trainer.fit(module, Loader(make_samples(4), 2, 2))
    except Built:
        return


class _Peak:
    """The most private memory that there is inside."""

    def __enter__(self) -> _Peak:
        self.value = _private_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.value = max(self.value, _private_bytes())


def _private_bytes() -> int:
    """Return what this process has for itself: not the files that it has mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


if __name__ == "__main__":
    main(sys.argv[1])
