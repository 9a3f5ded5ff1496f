"""A gradient that overflows is refused by the step, the samples and the loss that it has."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.toy_data import toy_samples
from tests.training.launching import start
from tests.training.refusal_job import BAD_STEP, NUM_STEPS, Job
from vipllava.shards.tars import write_shards
from vipllava.training.guard import StepRecord

pytest.importorskip("deepspeed")
CASES = [["zero2", "bf16-mixed", "skip"], ["zero3", "32-true", "stop"]]


@pytest.fixture(scope="module")
def ended(tiny_sources, tmp_path_factory) -> Path:
    """The folder of one job that has done all cases."""
    root = tmp_path_factory.mktemp("refusal")
    write_shards(toy_samples(22), root / "toy", max_samples=8)
    (root / "manifests").mkdir()
    (root / "manifests" / "toy.yaml").write_text(
        "schema_version: 2\nname: toy\nstage: finetune\nlicence: none\nshards: toy/*.tar\n"
    )
    spec = {
        "vision_tower": tiny_sources.vision_tower,
        "language_model": tiny_sources.language_model,
        "feature_layers": (-1, -2, 1),
        "chat_template": "llava_v1",
        "image_size": 28,
    }
    return start(Job(str(root / "job"), str(root), spec, CASES), 2)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_overflow_is_recorded_as_the_step_that_it_is(ended, case):
    ranks = [json.loads((ended / f"found{r}.json").read_text())["-".join(case)] for r in range(2)]
    folder = ended / f"{case[0]}-{case[2]}"
    paths = list((folder / "guard").iterdir())
    assert [path.name for path in paths] == [f"step-{BAD_STEP:06d}.json"]
    record = StepRecord.read(paths[0])

    assert record.step == record.place["step"] == BAD_STEP
    assert record.keys == [[rank["keys"][BAD_STEP]] for rank in ranks]
    assert record.reason.startswith("the gradient's norm is ")
    shares = [float(loss) for rank in record.losses for loss in rank]
    assert record.loss == pytest.approx(sum(shares), rel=1e-6)
    if case[2] == "stop":
        for rank in ranks:
            assert f"at step {BAD_STEP}; its samples are in {paths[0]}" in rank["message"]
            assert len(rank["keys"]) == BAD_STEP + 1
        return
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(NUM_STEPS))
    assert float(rows[BAD_STEP]["train/loss"]) == pytest.approx(record.loss, rel=1e-6)
    for rank in ranks:
        assert (rank["message"], rank["num_skipped"], rank["steps"]) == (None, 1, NUM_STEPS)
        weights = rank["weights"]
        same = [weights[n] == weights[n + 1] for n in range(NUM_STEPS - 1)]
        assert same == [n == BAD_STEP for n in range(NUM_STEPS - 1)]
