"""Useful work against the project's published accounting, and shares of a device's peak."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.forecast.measured_step import Module, Step, small_config
from vipllava.forecast.architecture import (
    LANGUAGE_MODELS,
    TOWERS,
    architecture_of,
    published_architecture,
)
from vipllava.forecast.flops import DEVICE_PEAKS, device_peak, tower_flops, useful_flops
from vipllava.models.adapters import AdapterSettings
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.types import ConfigError

TOWER, LAYERS = "openai/clip-vit-large-patch14-336", (-2, -5, -8, -11, 6)
IDS = {
    "7b": "lmsys/vicuna-7b-v1.5",
    "13b": "lmsys/vicuna-13b-v1.5",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "phi3_mini": "microsoft/Phi-3-mini-4k-instruct",
}
COUNTS = {
    # language model, adapters of rank 128, projector, rows of the vocabulary
    "7b": (6_738_939_904, 319_815_680, 37_767_168, 32064),
    "13b": (13_016_519_680, 500_695_040, 52_449_280, 32064),
    "llama3_8b": (8_030_785_536, 335_544_320, 37_767_168, 128320),
    "phi3_mini": (3_821_079_552, 201_326_592, 25_182_208, 32064),
}


def architecture(name: str):
    return published_architecture(TOWER, IDS[name], LAYERS)


@pytest.mark.parametrize("name", IDS)
def test_shipped_sizes_are_the_published_ones(name):
    found = architecture(name)
    model = found.language_model
    counts = (
        model.num_parameters,
        model.adapter_parameters(128),
        found.projector_parameters,
        model.vocabulary,
    )
    assert counts == COUNTS[name]
    assert found.tower.num_parameters == 303_507_456
    blocks = model.num_blocks * model.block_parameters
    assert model.num_parameters - blocks - 2 * model.head_parameters == model.width


def test_fused_layers_and_grouped_queries_are_seen():
    assert architecture("phi3_mini").language_model.block_linears == (
        (3072, 3072),
        (3072, 9216),
        (3072, 16384),
        (8192, 3072),
    )
    llama = architecture("llama3_8b").language_model
    assert (llama.num_heads, llama.num_key_value_heads, llama.head_dim) == (32, 8, 128)
    assert (4096, 1024) in llama.block_linears


def test_every_real_model_of_the_configuration_ships():
    from vipllava.commands.machines import MODELS
    from vipllava.config.composing import compose_job

    specs = [compose_job([f"model={name}", "trainer=cpu"]).model.spec for name in MODELS]
    assert {spec.language_model for spec in specs} == set(LANGUAGE_MODELS)
    assert {spec.vision_tower for spec in specs} == set(TOWERS)


def test_an_unknown_part_is_named():
    with pytest.raises(ConfigError, match=r"language_model=gpt2 do not ship .*preflight=true"):
        published_architecture(TOWER, "gpt2", LAYERS)


def test_the_tower_takes_0_37_teraflop_a_picture():
    """23 of its 24 blocks: the deepest feature layer is the last but one."""
    tower = architecture("7b").tower
    assert tower.deepest_block == 23
    assert tower_flops(tower) == pytest.approx(0.3660e12, rel=1e-4)


@pytest.mark.parametrize(
    ("workload", "per_token"), [("projector", 4.0), ("full", 6.0), ("lora", 4.2963)]
)
def test_work_per_weight_and_token(workload, per_token):
    """4 L T, 6 L T, and by 6 of 320M adapter weights per 6476M about 4.3 L T."""
    found = useful_flops(
        architecture("7b"),
        workload,
        num_samples=1,
        num_tokens=800,
        num_supervised=0,
        num_images=0,
        squared_tokens=0,
    )
    assert found / (6_476_005_376 * 800) == pytest.approx(per_token, abs=1e-4)


@pytest.mark.parametrize(("workload", "per_weight"), [("projector", 4), ("lora", 4), ("full", 6)])
def test_the_head_works_at_supervised_positions_only(workload, per_weight):
    """7B: 32 064 rows of 4096; the embedding table, as large, is looked up and no work."""
    options = {"num_samples": 1, "num_tokens": 800, "num_images": 0, "squared_tokens": 0}
    with_loss = useful_flops(architecture("7b"), workload, num_supervised=100, **options)
    without = useful_flops(architecture("7b"), workload, num_supervised=0, **options)
    assert with_loss - without == per_weight * 32_064 * 4096 * 100


@pytest.mark.parametrize(
    ("name", "workload", "tokens", "supervised", "tera"),
    [
        # 4 L T + 4 H S, attention, projector and tower: see the module.
        ("7b", "projector", 601, 25, 16.362),
        ("7b", "full", 774, 99, 31.120),
        ("llama3_8b", "full", 774, 99, 33.692),
    ],
)
def test_a_sample_of_the_recipe(name, workload, tokens, supervised, tera):
    options = {"num_samples": 1, "num_tokens": tokens, "num_supervised": supervised}
    found = useful_flops(architecture(name), workload, **options)
    assert found / 1e12 == pytest.approx(tera, abs=1e-3)


@pytest.mark.parametrize("workload", ["projector", "lora", "full", "full and tower"])
def test_it_is_what_a_step_multiplies(workload, tmp_path):
    """Forward and backward of a small network, every product counted by PyTorch."""
    if workload == "lora":
        pytest.importorskip("peft")
    step = Step(
        config=small_config(128, feature_layers=(-2, 1)),
        workload=workload,
        precision="32-true",
        rows=3,
        length=96,
        supervised=16,
        recomputed=0,
        adapter=AdapterSettings(r=8, alpha=16, dropout=0.0),
        attention="eager",
    )
    module, batch = Module(step, tmp_path, "cpu"), step.batch()
    module.configure_model()
    module.train()
    with FlopCounterMode(display=False) as counter:
        loss, num_supervised = supervised_loss_sum(module.network, batch)
        loss.backward()

    assert num_supervised == 3 * 16
    sizes = architecture_of(step.config)
    found = useful_flops(
        sizes,
        workload.split()[0],
        num_samples=3,
        num_tokens=3 * 96,
        num_supervised=num_supervised,
        adapter_rank=8,
        tower_trains="tower" in workload,
    )
    # This attention multiplies what the causal mask then hides: as much again, in three blocks.
    hidden = 6 * 3 * 128 * 3 * 96**2
    assert found + hidden == counter.get_total_flops()


def test_few_bits_save_no_work():
    work = [
        useful_flops(architecture("7b"), w, num_samples=2, num_tokens=9, num_supervised=4)
        for w in ("lora", "qlora")
    ]
    assert work[0] == work[1]


def test_attention_goes_by_the_squares_of_the_lengths():
    """7B: 3 passes x 2 operations x 32 layers x 4096 wide, half a square: 786 432 T^2."""
    options = {"num_samples": 2, "num_tokens": 1000, "num_supervised": 100, "num_images": 0}
    without = useful_flops(architecture("7b"), "full", squared_tokens=0, **options)
    equal = useful_flops(architecture("7b"), "full", **options)
    uneven = useful_flops(architecture("7b"), "full", squared_tokens=900**2 + 100**2, **options)
    assert equal - without == 786_432 * 2 * 500**2
    assert uneven - without == 786_432 * 820_000
    # At 800 tokens it is 2.3 % of the whole.
    one = {"num_samples": 1, "num_tokens": 800, "num_supervised": 200}
    whole = useful_flops(architecture("7b"), "projector", **one)
    share = whole - useful_flops(architecture("7b"), "projector", squared_tokens=0, **one)
    assert share / whole == pytest.approx(0.023, abs=0.001)


def test_a_tower_that_trains_takes_three_passes():
    found = architecture("7b")
    options = {"num_samples": 1, "num_tokens": 601, "num_supervised": 25}
    more = useful_flops(found, "projector", tower_trains=True, **options)
    more -= useful_flops(found, "projector", **options)
    pixels = 2 * 588 * 1024 * 576  # of which no gradient is asked for
    assert more == pytest.approx(2 * tower_flops(found.tower) - pixels)


@pytest.mark.parametrize(
    ("name", "samples_per_second", "expected"), [("7b", 5.5, 0.29), ("13b", 3.5, 0.355)]
)
def test_the_released_codes_mfu_in_stage_1(name, samples_per_second, expected):
    """On an A100, by samples per second and device."""
    work = useful_flops(
        architecture(name), "projector", num_samples=1, num_tokens=601, num_supervised=25
    )
    peak = device_peak("NVIDIA A100-SXM4-80GB")
    assert peak is not None
    assert work * samples_per_second / peak == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.25),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_drivers_names(name, tera):
    assert device_peak(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_every_trainers_device_has_a_peak():
    from vipllava.config.composing import CONFIG_DIR, compose_job

    for path in (CONFIG_DIR / "trainer").glob("*.yaml"):
        machine = compose_job([f"trainer={path.stem}"]).machine
        assert machine.device is None or device_peak(machine.device), path.stem
        assert (machine.device is None) == (machine.memory_gb is None), path.stem
    assert len(DEVICE_PEAKS) > 20


def test_an_unknown_workload_is_refused():
    with pytest.raises(ConfigError, match="workload='half' is not one of projector, full"):
        useful_flops(architecture("7b"), "half", num_samples=1, num_tokens=1, num_supervised=1)
