"""A training job of real processes that writes down every sample it consumes, to be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tests import preloaded


@dataclass(frozen=True)
class Job:
    """One start of the job.

    Attributes:
        root: holds data, manifests, checkpoints and the ranks' logs.
        name: of the run; its checkpoints and logs.
        ranks: processes.
        workers: loader processes per rank.
        micro_batch_size: rows.
        epochs: of the run.
        attempt: how often the run was started before.
        kill_at: global step at whose beginning every rank kills itself; None lets it end.
        data: further arguments of the data module.
        roots: data root of each rank, folder or address; empty: ``root``. The ranks are then
            machines of one process each.
    """

    root: Path
    name: str
    ranks: int = 1
    workers: int = 0
    micro_batch_size: int = 2
    epochs: int = 2
    attempt: int = 0
    kill_at: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    roots: tuple[str, ...] = ()


def start(job: Job) -> list[int]:
    """Run a job to its end and return the ranks' exit codes (-9: killed)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [preloaded.call(_run, job, rank, port) for rank in range(job.ranks)]
    try:
        return [rank.wait(180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def error_of(job: Job, rank: int) -> str:
    """Return the error that a rank ended with."""
    return _error_file(job, rank).read_text()


def _error_file(job: Job, rank: int) -> Path:
    return job.root / f"{job.name}-rank{rank}.error"


def consumed(root: Path, name: str) -> dict[tuple[int, int], list[list[str]]]:
    """Return by (epoch, step of the run) the keys of each row of the global batch, in its order.

    A step that was done again after a kill has to have been the same both times.
    """
    shares: dict[tuple[int, int, int], dict[int, list[list[str]]]] = {}
    worlds: dict[int, int] = {}
    for path in root.glob(f"{name}-attempt*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            attempt = entry["attempt"]
            worlds[attempt] = entry["world"]
            ranks = shares.setdefault((attempt, entry["epoch"], entry["step"]), {})
            ranks.setdefault(entry["rank"], []).extend(entry["rows"])
    batches: dict[tuple[int, int], list[list[str]]] = {}
    for (attempt, *step), ranks in sorted(shares.items()):
        if len(ranks) < worlds[attempt]:
            continue  # killed before every rank had written the step down
        longest = max(map(len, ranks.values()))
        rows = [
            ranks[rank][n] for n in range(longest) for rank in sorted(ranks) if n < len(ranks[rank])
        ]
        epoch, number = step
        assert batches.setdefault((epoch, number), rows) == rows, (attempt, step)
    return batches


def _run(job: Job, rank: int, port: int) -> None:
    try:
        _train(job, rank, port)
    except Exception as error:
        _error_file(job, rank).write_text(f"{type(error).__name__}: {error}")
        raise


def _train(job: Job, rank: int, port: int) -> None:
    # As in a real run; workers of a fork server outlive a trainer that is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    )
    if job.ranks > 1:
        local, node = (0, rank) if job.roots else (rank, 0)
        os.environ.update({"LOCAL_RANK": str(local), "NODE_RANK": str(node)})
    os.environ["no_proxy"] = "127.0.0.1"
    import warnings

    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.stream.test_datamodule import make_module, make_trainer
    from tests.toy_stream import make_encoder
    from vipllava.visual_prompts.policies import VisualPromptPolicy

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checkpoints = job.root / f"{job.name}-checkpoints"
    newest = sorted(checkpoints.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    log = job.root / f"{job.name}-attempt{job.attempt}-rank{rank}.jsonl"
    place: dict[str, Any] = {}
    if job.roots:
        cache = job.root / f"{job.name}-cache{rank}"
        place = {"data_root": job.roots[rank], "cache_dir": cache}
    module = make_module(
        job.root,
        make_encoder(max_length=512),
        {"regions": VisualPromptPolicy()},
        micro_batch_size=job.micro_batch_size,
        num_workers=job.workers,
        **{"run_dir": job.root / job.name, **place, **job.data},
    )
    rows = module.global_batch_size
    trainer = make_trainer(
        job.root,
        max_epochs=job.epochs,
        devices=1 if job.roots else job.ranks,
        num_nodes=job.ranks if job.roots else 1,
        accumulate_grad_batches=rows // (job.micro_batch_size * job.ranks),
        callbacks=[
            ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ],
        **({"strategy": "ddp"} if job.ranks > 1 else {}),
    )
    model = _recorder(job, log)
    resume = newest[-1] if newest else None
    trainer.fit(model, datamodule=module, ckpt_path=resume, weights_only=False)


def _recorder(job: Job, log: Path) -> Any:
    from tests.stream.test_datamodule import Recorder

    class Writer(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            trainer = self.trainer
            if trainer.global_step == job.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rows: list[list[str]] = []
            keys = iter(batch.counted_keys)
            for segments in batch.segment_ids.max(dim=1).values.tolist():
                if row := list(islice(keys, segments + 1)):
                    rows.append(row)
            entry = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "world": trainer.world_size,
                "rank": trainer.global_rank,
                "attempt": job.attempt,
                "rows": rows,
            }
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            return super().training_step(batch, batch_idx)

    return Writer()
