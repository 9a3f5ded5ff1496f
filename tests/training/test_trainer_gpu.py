"""Real runs of a few steps on one CUDA device, each way that one device can: `pytest -m gpu`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.training.gpu_cases import NUM_STEPS, Case, near, train
from tests.training.toy_training import LIGHTNING_WARNINGS
from vipllava.config import hardware
from vipllava.config.attention import attention_candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *LIGHTNING_WARNINGS,
    # Libraries' own, on devices.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # The reference runs on the CPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # A scale that is too high at first leaves the first steps out, of which PyTorch warns.
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
]
CASES = [
    *(
        Case(precision=p, packed=packed)
        for p in ("bf16-mixed", "16-mixed")
        for packed in (False, True)
    ),
    Case(precision="32-true"),
    Case(stage="pretrain"),
    Case(tuning="lora"),
    Case(tuning="lora", precision="16-mixed"),
    Case(tuning="qlora"),
    Case(tuning="qlora", precision="16-mixed", packed=True),
    Case("ddp"),
    Case("ddp", tuning="qlora"),
    Case("fsdp2", packed=True),
    Case("zero2", precision="16-mixed"),
    Case("zero3", tuning="lora", packed=True),
    Case("zero3_offload"),
]


def _require(case: Case) -> None:
    needed = ["hydra", "webdataset"]
    needed += ["deepspeed"] * case.strategy.startswith("zero")
    needed += ["peft"] * (case.tuning != "full") + ["bitsandbytes"] * (case.tuning == "qlora")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def reference() -> dict[Case, list[float]]:
    """Losses on the CPU in float32, by case."""
    return {}


@pytest.fixture
def check(config, tiny_sources, reference) -> Callable[..., None]:
    """Train a case on the device and compare its losses with the CPU's."""

    def run(case: Case, *, stops: bool = False) -> None:
        _require(case)
        in_child = case.strategy.startswith("zero")
        found = train(case, config, tiny_sources, stops=stops, in_child=in_child)
        on_cpu = replace(case, strategy="single", precision="32-true", attention="sdpa")
        if on_cpu not in reference:
            reference[on_cpu] = train(on_cpu, config, tiny_sources, "cpu")
        expected = reference[on_cpu]
        assert len(found) == len(expected)
        assert case.packed or len(found) == NUM_STEPS
        assert all(map(math.isfinite, found))
        # fp16's first steps may be left out by its scaling; the first loss is before any.
        assert found[0] == pytest.approx(expected[0], rel=3e-2)
        if case.precision != "16-mixed":
            assert found == near(expected, case)
        # The second pass over the samples is better than the first: steps have been done.
        half = len(found) // 2
        assert sum(found[half:]) < 0.9 * sum(found[:half])

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_trains_as_one_on_the_cpu(case, check):
    check(case)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "attention", ["torch_varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
)
def test_every_attention_that_is_here(attention, packed, check):
    machine = hardware.detect()
    candidates = attention_candidates(machine.installed, machine.least_capability, "bf16-mixed")
    (candidate,) = (c for c in candidates if c.name == attention)
    if candidate.missing or candidate.unsupported:
        pytest.skip(f"{candidate.missing or candidate.unsupported}")
    check(Case(attention=attention, packed=packed))


@pytest.mark.parametrize(
    "case",
    [Case(), Case(tuning="lora"), Case("fsdp2"), Case("zero2"), Case("zero3")],
    ids=str,
)
def test_a_run_that_stops_goes_on(case, check):
    check(case, stops=True)
