"""Batches in flight against the room that shared memory has."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from vipllava.training.preflight import shared_memory_warning


def _job(**data: Any) -> Any:
    data = {"batching": "shuffled", "global_batch_size": 256, "num_workers": 4, **data}
    stage = {"pack_length": 4096, "mean_length": 1024}
    return OmegaConf.create(
        {"trainer": {"devices": 8, "num_nodes": 2}, "data": data, "stage": stage}
    )


def test_what_does_not_fit_is_said_with_its_numbers():
    need = 8 * 4 * 2 * 16 * 3 * 336 * 336
    assert shared_memory_warning(_job(), 336, need) is None
    assert shared_memory_warning(_job(), 336, None) is None
    assert shared_memory_warning(_job(num_workers=0), 336, 0) is None
    assert shared_memory_warning(_job(), 336, 67_108_864) == (
        "/dev/shm has 67.1 MB free, and batches in flight take 346.8 MB (8 processes x 4 workers x "
        "2 ahead x 16 images of 336 x 336): a loader process may die of it: docker run "
        "--shm-size=16g (or --ipc=host), or machine.num_workers=0"
    )
    assert "x 64 images of" in str(shared_memory_warning(_job(batching="packed"), 336, need))
