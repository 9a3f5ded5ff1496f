"""Every shipped strategy on two processes gives the losses and gradient norms of one process."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.training.launching import start
from tests.training.strategies_job import Case, Job
from vipllava.checkpoints.training_state import read_training_state
from vipllava.models.building import ModelSpec

# Stage 1, and what all later stages train; each with and without accumulation and clipping. The
# norms are near 1: 0.05 clips every step, 1000 none.
ALL = Case(["projector", "language_model"], 1, 0.05)
ONE_LEFT_OUT = replace(ALL, skip=6)
IN_HALF = replace(ALL, precision="bf16-mixed", fused=True, steps=10)
STOPPED = Case(["projector"], 1, None, stops=True, steps=10)
CHANGED = Case(["projector", "language_model"], 1, 0.05, stops=True, changes=True, steps=10)
CASES = [
    Case(["projector"], 1, None),
    Case(["projector"], 2, 0.05, steps=10),
    ALL,
    Case(["vision_tower", "projector", "language_model"], 2, 1000.0, steps=10),
    ONE_LEFT_OUT,
    IN_HALF,
    STOPPED,
    CHANGED,
]


@pytest.fixture(scope="module")
def spec(tiny_sources) -> dict:
    return asdict(
        ModelSpec(
            vision_tower=tiny_sources.vision_tower,
            language_model=tiny_sources.language_model,
            feature_layers=(-2, 1),  # of three blocks: nothing reads the last one
            chat_template="llava_v1",
            image_size=28,
        )
    )


def _rows(folder: Path, strategy: str, spec: dict) -> dict[str, list[dict[str, float]]]:
    job = Job(str(folder / strategy), strategy, spec, [asdict(case) for case in CASES])
    start(job, 1 if strategy == "one" else 2)
    return json.loads((folder / strategy / "rows.json").read_text())


@pytest.fixture(scope="module")
def expected(spec, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    return _rows(tmp_path_factory.mktemp("one"), "one", spec)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        "fsdp2",
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
        pytest.param("zero3_offload", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(spec, expected, tmp_path, strategy):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    found = _rows(tmp_path, strategy, spec)
    for case in CASES:
        one, two = expected[case.name], found[case.name]
        assert len(one) == len(two) == case.steps, case
        # In bfloat16 each way of sharding rounds in places of its own.
        near, norms_near = (5e-3, 5e-2) if case is IN_HALF else (1e-4, 1e-4)
        for name in ("train/loss", "train/supervised_tokens", "train/lr"):
            values = [row[name] for row in one]
            assert [row[name] for row in two] == pytest.approx(values, rel=near), (case, name)
        # What is left out has no gradient.
        norms, expected_norms = (
            [row.get("train/grad_norm") for row in rows] for rows in (two, one)
        )
        for step, (norm, expected_norm) in enumerate(zip(norms, expected_norms, strict=True)):
            assert (expected_norm is None) == (step == case.skip), case
            assert norm == (expected_norm and pytest.approx(expected_norm, rel=norms_near)), case
    # A checkpoint holds what trains, whoever writes it.
    state = read_training_state(tmp_path / strategy / "half-way.ckpt")
    assert len(state) == 6
    assert all(name.startswith("multi_modal_projector.") for name in state)
    # The weights of a step that is left out are not changed by it, and those after it are.
    every, without = (expected[case.name] for case in (ALL, ONE_LEFT_OUT))
    same = [a["train/loss"] == b["train/loss"] for a, b in zip(every, without, strict=True)]
    assert same == [True] * 7 + [False] * 13
    # What has changed when a run goes on holds from the next step on.
    rates = [row["train/lr"] for row in found[CHANGED.name]]
    assert rates == pytest.approx([0.0, *[1e-3] * 4, *[5e-3] * 5])
    clipped = [case for case in CASES if case.clip == 0.05]
    for case in clipped:
        assert min(row.get("train/grad_norm", 1.0) for row in expected[case.name]) > 0.05
