"""Steps, hours, disk, micro-batches and strategies from plain values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vipllava.forecast.architecture import published_architecture
from vipllava.forecast.job import (
    Corpus,
    DataSetShare,
    RunPlan,
    checkpoint_bytes,
    choose_strategy,
    device_capacity,
    export_bytes,
    fewest_recomputed,
    forecast,
    largest_micro_batch,
    micro_batches,
    possible_strategies,
)
from vipllava.forecast.memory import Setup, device_memory

TOWER, LAYERS = "openai/clip-vit-large-patch14-336", (-2, -5, -8, -11, 6)
SETUP = Setup(
    trainable=("projector", "language_model"),
    workload="full",
    strategy="zero2",
    precision="bf16-mixed",
    num_devices=8,
    micro_batch_size=16,
    row_tokens=2048,
    row_supervised=800,
    attention="flash_attention_2",
)
PROJECTOR = replace(SETUP, trainable=("projector",), workload="projector", row_tokens=768)
CORPUS = Corpus(
    datasets=(DataSetShare("a", 1000, 2000), DataSetShare("b", 5000, 500)),
    mean_tokens=800.0,
    mean_squared_tokens=800.0**2,
    images_per_sample=1.0,
    longest=2048,
    supervised_share=0.4,
    mean_supervised=112.0,
)


@pytest.fixture(scope="module")
def seven():
    return published_architecture(TOWER, "lmsys/vicuna-7b-v1.5", LAYERS)


@pytest.fixture(scope="module")
def thirteen():
    return published_architecture(TOWER, "lmsys/vicuna-13b-v1.5", LAYERS)


def test_steps_work_and_how_often_data_are_seen(seven):
    found = forecast(seven, SETUP, CORPUS, RunPlan(epochs=3, global_rows=128, device="A100"))

    assert found.num_steps == 60  # 2500 samples are 20 steps, the last one smaller
    assert (found.samples_per_step, found.tokens_per_step) == (128, 102_400)
    # 32.17 TFLOP a sample of 800 tokens, a picture among them.
    assert found.flops_per_step == pytest.approx(128 * 32.173e12, rel=1e-4)
    assert found.times_seen == {"a": 6.0, "b": 0.3}
    assert found.hours == pytest.approx(7500 * 32.173e12 / (0.4 * 8 * 312e12) / 3600, rel=1e-4)
    trained = {row.part: row.num_trainable for row in found.parameters}
    assert trained == {
        "vision_tower": 0,
        "projector": 37_767_168,
        "language_model": 6_738_939_904,
    }


def test_packs_hold_several_samples(seven):
    plan = RunPlan(epochs=1, global_rows=32, samples_per_row=5.0, device="A100")
    found = forecast(seven, SETUP, CORPUS, plan)
    assert (found.num_steps, found.samples_per_step) == (16, 160)


def test_what_is_not_known_is_none(seven):
    unknown = replace(CORPUS, datasets=(DataSetShare("a", 0, 0),))
    found = forecast(seven, SETUP, unknown, RunPlan(1, 128, device="A100"))
    assert (found.num_steps, found.hours, found.times_seen) == (None, None, {})
    assert found.flops_per_step > 0
    assert forecast(seven, SETUP, CORPUS, RunPlan(1, 128, device="Quadro 1")).hours is None


def test_checkpoints_and_exports(seven):
    projector, every = 37_767_168, 7_080_214_528
    full = 37_767_168 + 6_738_939_904
    assert checkpoint_bytes(seven, replace(PROJECTOR, strategy="ddp")) == 12 * projector
    assert checkpoint_bytes(seven, PROJECTOR) == 12 * projector
    assert checkpoint_bytes(seven, SETUP) == 12 * full
    assert export_bytes(seven, SETUP) == 2 * every
    assert export_bytes(seven, PROJECTOR) == 2 * (every + projector)
    lora = replace(SETUP, workload="lora", adapter_rank=128, strategy="ddp")
    assert export_bytes(seven, lora) == 4 * (every + projector + 319_815_680)
    found = forecast(seven, SETUP, CORPUS, RunPlan(1, 128, num_checkpoints=2))
    assert found.disk_bytes == 3 * 12 * full + 2 * every


@pytest.mark.parametrize(
    ("global_rows", "devices", "sizes"),
    [(128, 8, [1, 2, 4, 8, 16]), (96, 8, [1, 2, 3, 4, 6, 12]), (10, 8, []), (4, 8, [])],
)
def test_micro_batches_divide_the_global_batch(global_rows, devices, sizes):
    assert micro_batches(global_rows, devices) == sizes


def test_the_largest_micro_batch_that_fits(seven):
    assert largest_micro_batch(seven, SETUP, device_capacity(40), 128) == 8

    def total(size: int) -> float:
        return device_memory(seven, replace(SETUP, micro_batch_size=size)).total

    assert total(8) <= device_capacity(40) < total(16)
    assert largest_micro_batch(seven, SETUP, 1e9, 128) is None


def test_the_published_recipe_fits_its_machine(thirteen):
    """13B in full, 16 rows of 2048 on each of eight A100 of 80 GB with ZeRO-2; 32 in stage 1."""
    found = choose_strategy(thirteen, SETUP, device_capacity(80), 128)
    assert found is not None
    assert (found.strategy, found.micro_batch_size) == ("zero2", 16)
    stage_1 = replace(PROJECTOR, micro_batch_size=32)
    found = choose_strategy(thirteen, stage_1, device_capacity(80), 256)
    assert found is not None
    assert (found.strategy, found.micro_batch_size) == ("zero2", 32)


def test_a_smaller_machine_shards_more_and_then_offloads(thirteen):
    chosen = {}
    for gigabytes in (80, 48, 24, 8):
        found = choose_strategy(
            thirteen, replace(SETUP, micro_batch_size=2), device_capacity(gigabytes), 128
        )
        chosen[gigabytes] = found and found.strategy
    assert chosen == {80: "zero2", 48: "zero3", 24: "zero3_offload", 8: None}


def test_where_nothing_fits_as_wanted_the_largest_counts(seven):
    """Not offloading, which would fit more rows and be slower."""
    found = choose_strategy(seven, SETUP, device_capacity(24), 128)
    assert found is not None
    assert (found.strategy, found.micro_batch_size) == ("zero3", 4)
    offloaded = largest_micro_batch(
        seven, replace(SETUP, strategy="zero3_offload"), device_capacity(24), 128
    )
    assert offloaded == 8
    assert found.memory.total <= device_capacity(24)


def test_what_could_take_a_strategys_place():
    assert possible_strategies(replace(SETUP, num_devices=1)) == ("single",)
    assert possible_strategies(SETUP) == ("zero2", "zero3", "zero3_offload")
    assert possible_strategies(replace(SETUP, strategy="ddp"))[0] == "ddp"
    assert possible_strategies(replace(SETUP, workload="qlora")) == ("ddp",)
    assert possible_strategies(replace(SETUP, precision="32-true")) == ("ddp",)


def test_a_device_has_a_little_less_than_its_name_says():
    assert device_capacity(80) / 2**30 == pytest.approx(78.8)


def test_as_few_blocks_are_recomputed_as_memory_allows(seven):
    large = replace(PROJECTOR, micro_batch_size=32)

    def count(gb: float, **changes: object) -> int:
        return fewest_recomputed(seven, replace(large, **changes), device_capacity(gb))

    assert count(1000) == 0
    assert count(24) == 32  # nothing fits: all of them
    chosen = count(80)
    assert 0 < chosen < 32
    # The chosen number leaves a tenth of the memory, one fewer does not.
    totals = [
        1.1 * device_memory(seven, replace(large, recomputed_blocks=n)).total
        for n in (chosen, chosen - 1)
    ]
    assert totals[0] <= device_capacity(80) < totals[1]
    assert count(80, micro_batch_size=8) == 0 < count(80, micro_batch_size=24) < chosen
