"""What a node needs beside its devices, from sizes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vipllava.forecast.architecture import published_architecture
from vipllava.forecast.memory import HostMemory, Setup, device_memory, host_memory, machine_memory

EVERY = 7_080_214_528  # weights of a 7B with tower and projector
TRAINED = 37_767_168 + 6_738_939_904


@pytest.fixture(scope="module")
def seven():
    tower, layers = "openai/clip-vit-large-patch14-336", (-2, -5, -8, -11, 6)
    return published_architecture(tower, "lmsys/vicuna-7b-v1.5", layers)


def setup_for(strategy: str, num_devices: int = 8) -> Setup:
    return Setup(
        trainable=("projector", "language_model"),
        workload="full",
        strategy=strategy,
        precision="bf16-mixed",
        weights_dtype="bfloat16" if strategy.startswith("zero") else "float32",
        num_devices=num_devices,
        micro_batch_size=8,
        row_tokens=2048,
        row_supervised=800,
    )


@pytest.mark.parametrize(
    ("strategy", "copies", "trained", "saving"),
    [
        ("ddp", 0, 0, 12 * TRAINED),
        ("fsdp2", 4 * EVERY, 0, 4 * EVERY),
        ("zero2", 0, 0, 4 * TRAINED),
        ("zero3_offload", 0, 18 * TRAINED, 2 * EVERY),
    ],
)
def test_a_node_under_every_strategy(seven, strategy, copies, trained, saving):
    found = host_memory(seven, setup_for(strategy), num_workers=4)
    assert (found.copies, found.trained, found.saving) == (copies, trained, saving)
    # Two GB of each process, 0.3 of each of its loaders.
    assert found.processes == 8 * 3.2e9
    assert found.files == 2 * EVERY
    assert found.total >= found.processes + copies


def test_nodes_share_processes_and_what_is_offloaded(seven):
    one = host_memory(seven, setup_for("zero3_offload"))
    two = host_memory(seven, setup_for("zero3_offload", 16), num_nodes=2)
    assert two.processes == one.processes
    assert two.trained == one.trained / 2


def test_without_devices_the_host_holds_the_training(seven):
    setup = replace(setup_for("single", 1), precision="32-true")
    memory = device_memory(seven, setup)
    found = host_memory(seven, setup, on_devices=False)
    assert found.trained == memory.total - memory.overhead
    assert found.total == found.processes + found.trained + found.saving


def test_the_larger_of_start_and_training_counts():
    assert HostMemory(1.0, 9.0, 2.0, 3.0, 100.0).total == 10.0
    assert HostMemory(1.0, 2.0, 3.0, 4.0, 100.0).total == 8.0


def test_this_machine_says_what_it_has():
    found = machine_memory()
    assert found is not None
    assert found > 2**28
