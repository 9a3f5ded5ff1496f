"""Batches in flight against the room that shared memory has."""

from __future__ import annotations

from vipllava.training.shared_memory import shared_memory_warning


def test_what_does_not_fit_is_said_with_its_numbers():
    job = {"images": 16, "image_size": 336, "num_workers": 4, "num_processes": 8}
    need = 8 * 4 * 2 * 16 * 3 * 336 * 336
    assert shared_memory_warning(need, **job) is None
    assert shared_memory_warning(None, **job) is None
    assert shared_memory_warning(0, **{**job, "num_workers": 0}) is None
    assert shared_memory_warning(67_108_864, **job) == (
        "/dev/shm has 67.1 MB free, and batches in flight take 346.8 MB (8 processes x 4 workers x "
        "2 ahead x 16 images of 336 x 336): a loader process may die of it: docker run "
        "--shm-size=16g (or --ipc=host), or machine.num_workers=0"
    )
