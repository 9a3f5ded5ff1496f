"""What the first process does alone at the end has no limit but its own, and ends for all."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.tiny_model import tiny_spec
from tests.training.launching import run, start
from tests.training.sharded_job import Job
from vipllava.checkpoints.loading import open_source
from vipllava.training.first_alone import first_alone
from vipllava.types import VipLlavaError


@pytest.fixture
def job(tiny_sources, tmp_path) -> Job:
    spec = tiny_spec(tiny_sources)
    return Job(str(tmp_path / "job"), "ddp", asdict(spec), ["projector"])


def test_an_export_may_take_longer_than_a_collective(job):
    folder = start(replace(job, export_seconds=4.0), 2)

    assert open_source(str(folder / "export")).kind == "hf"


def test_an_export_that_fails_ends_every_process_and_each_says_why(job):
    (first, told), (second, heard) = run(replace(job, export_fails=True), 2)

    assert (first, second) == (1, 1)
    assert "No space left on device" in told
    assert "VipLlavaError: the first process failed: exporting the model to" in heard
    assert "No space left on device" in heard


def test_the_first_process_works_and_the_others_do_not_wait_for_ever(monkeypatch):
    """In one process, which is one after the other each of two; a store is all they share."""
    distributed: Any = torch.distributed
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
    done: list[str] = []

    first_alone(True, "counting", lambda: done.append("first"))
    assert done == ["first"]

    with pytest.raises(VipLlavaError, match=r"waited 0:00:00.2\d* for the first process: counting"):
        first_alone(False, "counting", lambda: done.append("x"), limit=timedelta(seconds=0.2))
    assert done == ["first"]


def test_without_a_group_the_only_process_works():
    done: list[str] = []
    first_alone(True, "counting", lambda: done.append("alone"))
    assert done == ["alone"]
