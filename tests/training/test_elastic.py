"""A run goes on, step for step, on another number of processes and under another ZeRO stage."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_model import tiny_spec
from tests.training.elastic_job import STEPS_OF_HALF, Half, Job
from tests.training.launching import start
from vipllava.checkpoints.plain_pickles import read_metadata
from vipllava.checkpoints.training_state import INDEX, read_training_state
from vipllava.models.tensor_files import read_tensor, shape_of
from vipllava.training.deepspeed_strategy import ElasticDeepSpeedStrategy
from vipllava.types import ConfigError

pytest.importorskip("deepspeed")
ENDS = ("fsdp2", "zero2", "zero3")


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Runner:
    """Runs halves on processes; their checkpoints are named after strategy and processes."""

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
def runner(tiny_sources, tmp_path_factory) -> Runner:
    spec = tiny_spec(tiny_sources)
    return Runner(asdict(spec), tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def alone(runner) -> list[dict[str, Any]]:
    """One process that never stops, and a first half under ZeRO-3."""
    return runner.run(1, Half("one"), Half("zero3", ends=runner.path("zero3-1"), persist=100_000))


@pytest.fixture(scope="module")
def expected(alone) -> list[list[float]]:
    """Losses, gradient norms and rates of one process that never stops."""
    assert len(alone[0]["rows"]) == 2 * STEPS_OF_HALF
    return alone[0]["rows"]


@pytest.fixture(scope="module")
def among_two(runner, alone) -> list[dict[str, Any]]:
    path = runner.path
    return runner.run(
        2,
        *(Half(name, ends=path(f"{name}-2")) for name in ENDS),
        Half("zero2", ends=path("half-2"), precision="16-mixed"),
        Half("zero3", path("zero2-2"), persist=100_000),
        Half("zero2", path("zero3-1")),
    )


def _check(found: dict[str, Any], expected: list[list[float]]) -> None:
    assert found["error"] is None
    assert len(found["rows"]) == STEPS_OF_HALF
    for row, wanted in zip(found["rows"], expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


def test_on_two_processes(expected, alone, among_two):
    first, second = expected[:STEPS_OF_HALF], expected[STEPS_OF_HALF:]
    for half in (alone[1], *among_two[:3]):
        _check(half, first)
    for half in among_two[4:]:
        _check(half, second)


def test_what_two_wrote_goes_on_on_one(runner, expected, among_two, tmp_path):
    path, marker = runner.path, tmp_path / "code_was_run"
    lacking = Path(shutil.copytree(path("zero2-2"), tmp_path / "lacking"))
    (lacking / "rank-00001.pt").unlink()
    own = tmp_path / "own" / "checkpoint"
    own.mkdir(parents=True)
    torch.save({"module": _Code(marker)}, own / "mp_rank_00_model_states.pt")
    refused = {
        "rank-00001.pt is missing": Half("zero2", str(lacking)),
        "rank-00000.pt cannot be read": Half(
            "zero3", _with_code(path("zero3-2"), tmp_path, marker)
        ),
        "in DeepSpeed's own format": Half("zero2", str(own.parent)),
        "holds code, which is not run": Half(
            "fsdp2", _distributed_with_code(path("fsdp2-2"), tmp_path, marker)
        ),
    }
    found = runner.run(
        1,
        *(Half(name, path(f"{name}-2")) for name in ENDS),
        Half("zero2", precision="16-mixed"),
        Half("zero2", path("half-2"), precision="16-mixed"),
        *refused.values(),
    )
    for half in found[:3]:
        _check(half, expected[STEPS_OF_HALF:])
    # The scale and when it changes next, too.
    whole, rest = found[3:5]
    assert whole["scaling"] == rest["scaling"]
    assert whole["scaling"][0] != 2**16
    losses = [[row[0] for row in half["rows"]] for half in (whole, rest)]
    assert losses[1] == pytest.approx(losses[0][STEPS_OF_HALF:], rel=1e-3)
    for message, half in zip(refused, found[5:], strict=True):
        assert message in half["error"]
        assert half["rows"] == []
    assert not marker.exists()


def _with_code(source: str, folder: Path, marker: Path) -> str:
    path = Path(shutil.copytree(source, folder / "with_code"))
    torch.save({"parts": _Code(marker)}, path / "rank-00000.pt")
    index = json.loads((path / INDEX).read_text())
    index["files"]["rank-00000.pt"] = (path / "rank-00000.pt").stat().st_size
    (path / INDEX).write_text(json.dumps(index))
    return str(path)


def _distributed_with_code(source: str, folder: Path, marker: Path) -> str:
    """Put code where the optimizer's rate is, which PyTorch's reader unpickles."""
    path = Path(shutil.copytree(source, folder / "distributed_with_code"))
    metadata = read_metadata(path)
    index = next(index for index in metadata.storage_data if index.fqn.endswith("lr"))
    stored = metadata.storage_data[index]
    with (path / stored.relative_path).open("ab") as file:
        stored.offset = file.tell()
        torch.save(_Code(marker), file)
        stored.length = file.tell() - stored.offset
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return str(path)


def test_weights_out_of_a_checkpoint_of_two(runner, among_two):
    states = {name: read_training_state(Path(runner.path(f"{name}-2"))) for name in ENDS}
    assert len(states["fsdp2"]) == 27
    for name in ("zero2", "zero3"):
        assert states[name].keys() == states["fsdp2"].keys()
        for key, tensor in states["fsdp2"].items():
            assert shape_of(states[name][key]) == shape_of(tensor)
            found = read_tensor(states[name][key])
            torch.testing.assert_close(found, read_tensor(tensor), rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device=nvme",
        ),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "optimizer"),
    ],
)
def test_what_checkpoints_do_not_know_is_refused_at_the_start(config, named):
    with pytest.raises(ConfigError, match=f"asks for {named}, which checkpoints here do not know"):
        ElasticDeepSpeedStrategy(config=config)


@pytest.mark.slow
def test_offload_and_three_processes(runner, expected, among_two):
    path = runner.path
    three = runner.run(
        3,
        *(Half(name, path(f"{name}-2")) for name in ENDS),
        Half("zero3", path("zero3-1")),
        Half("zero3_offload", path("zero2-2")),
        Half("zero3_offload", ends=path("zero3_offload-3")),
    )
    one = runner.run(
        1, Half("zero3_offload", path("zero3_offload-3")), Half("zero2", path("zero3_offload-3"))
    )
    _check(three[-1], expected[:STEPS_OF_HALF])
    for half in (*three[:-1], *one):
        _check(half, expected[STEPS_OF_HALF:])
