"""A run goes on, step for step, on another number of processes and under another ZeRO stage."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.training.elastic_job import STEPS_OF_HALF, Half, Job
from tests.training.launching import start
from vipllava.models.building import ModelSpec


@pytest.fixture(scope="module")
def spec(tiny_sources) -> dict:
    return asdict(
        ModelSpec(
            vision_tower=tiny_sources.vision_tower,
            language_model=tiny_sources.language_model,
            feature_layers=(-1, -2, 1),
            chat_template="llava_v1",
            image_size=28,
        )
    )


class Runner:
    """Runs halves on processes and keeps their checkpoints."""

    def __init__(self, spec: dict, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.num_jobs = 0

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.ckpt")

    def run(self, num_processes: int, *halves: Half) -> list[dict[str, Any]]:
        self.num_jobs += 1
        folder = self.folder / f"job-{self.num_jobs}"
        start(Job(str(folder), self.spec, [asdict(half) for half in halves]), num_processes)
        return json.loads((folder / "rows.json").read_text())


@pytest.fixture(scope="module")
def runner(spec, tmp_path_factory) -> Runner:
    return Runner(spec, tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def expected(runner) -> list[list[float]]:
    """Losses, gradient norms and rates of one process that never stops."""
    (whole,) = runner.run(1, Half("one"))
    assert len(whole["rows"]) == 2 * STEPS_OF_HALF
    return whole["rows"]


def _check(found: dict[str, Any], expected: list[list[float]]) -> None:
    assert found["error"] is None
    assert len(found["rows"]) == STEPS_OF_HALF
    for row, wanted in zip(found["rows"], expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


def test_zero_on_another_number_of_processes(runner, expected):
    pytest.importorskip("deepspeed")
    path = runner.path
    first, second = expected[:STEPS_OF_HALF], expected[STEPS_OF_HALF:]
    two = runner.run(
        2,
        Half("zero2", ends=path("zero2-of-two")),
        Half("zero3", ends=path("zero3-of-two")),
        Half("zero3", path("zero2-of-two"), persist=100_000),
        Half("zero2", path("zero2-of-two")),
    )
    one = runner.run(
        1,
        Half("zero2", path("zero2-of-two")),
        Half("zero3", path("zero3-of-two")),
        Half("zero2", path("zero3-of-two")),
        Half("zero3", ends=path("zero3-of-one"), persist=100_000),
    )
    for half in (two[0], two[1], one[3]):
        _check(half, first)
    for half in (two[2], two[3], one[0], one[1], one[2]):
        _check(half, second)
    three = runner.run(3, Half("zero3", path("zero3-of-one")), Half("zero2", path("zero3-of-two")))
    for half in three:
        _check(half, second)
