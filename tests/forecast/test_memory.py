"""The memory forecast against what real runs of a tiny network hold."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("peft")

from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, LlamaConfig

from tests import preloaded
from tests.forecast.measured_step import (
    TRAINABLE,
    Step,
    held_bytes,
    measure_as_deepspeed,
    measure_on_cpu,
    small_config,
)
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.config.schema import SHARDING_STRATEGIES
from vipllava.forecast import memory as forecast
from vipllava.forecast.architecture import architecture_of, published_architecture
from vipllava.forecast.memory import DeviceMemory, Setup, device_memory, parameter_rows
from vipllava.models.adapters import AdapterSettings
from vipllava.models.building import ModelSpec, network_config
from vipllava.models.quantization import QuantizationSettings
from vipllava.types import ConfigError

pytestmark = LIGHTNING_WARNINGS
ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {name: TRAINABLE[name] for name in ("projector", "full", "lora")}
PUBLISHED = ("openai/clip-vit-large-patch14-336", (-2, -5, -8, -11, 6))


def setup_for(workload: str, **changes: object) -> Setup:
    values: dict = {
        "trainable": TRAINABLE[workload],
        "workload": workload,
        "strategy": "single",
        "precision": "32-true",
        "num_devices": 1,
        "micro_batch_size": 2,
        "row_tokens": 24,
        "adapter_rank": 4,
    }
    return Setup(**values | changes)


class Held(Callback):
    """Notes what is held after an optimizer step, in bytes."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        (optimizer,) = trainer.optimizers
        self.sizes = held_bytes(pl_module.network, optimizer)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_weights_gradients_and_optimizer_are_those_of_a_real_run(
    make_module, make_trainer, workload
):
    adapter = AdapterSettings(r=4, alpha=8, dropout=0.0) if workload == "lora" else None
    module = make_module(trainable=list(WORKLOADS[workload]), adapter=adapter)
    held = Held()
    make_trainer(callbacks=[held]).fit(module, Loader(make_samples(4), 2, 1))

    setup = setup_for(workload)
    architecture = architecture_of(module.network.config)
    memory = device_memory(architecture, setup)
    assert set(held.sizes) == {"weights", "gradients", "optimizer"}
    for name, size in held.sizes.items():
        assert getattr(memory, name) == pytest.approx(size, rel=0.02), name
    rows = {row.part: row.num_trainable for row in parameter_rows(architecture, setup)}
    assert 4 * sum(rows.values()) == held.sizes["gradients"]


SHAPES = {
    # Rows, tokens of each, width of the language model: what a step's memory is mostly made of.
    "activations": (2, 256, 128),
    "weights": (1, 64, 256),
}
MEASURED = [
    *itertools.product(["single"], TRAINABLE, [None, 2, 0], ["activations"]),
    *itertools.product(["single"], ["full", "lora", "full and tower"], [None, 0], ["weights"]),
    *itertools.product(["zero2"], ["projector", "full", "lora"], [None, 2, 0], ["activations"]),
    *itertools.product(["float32"], ["projector", "full", "lora"], [None, 0], ["activations"]),
]


@pytest.mark.parametrize(("arithmetic", "workload", "recomputed", "shape"), MEASURED)
def test_a_step_holds_what_is_forecast(arithmetic, workload, recomputed, shape, tmp_path):
    """By Lightning's own precision plugin, every tensor counted while it lives."""
    if workload == "qlora":
        pytest.importorskip("bitsandbytes")
    rows, length, width = SHAPES[shape]
    precision = "32-true" if arithmetic == "float32" else "bf16-mixed"
    step = Step(
        config=small_config(width),
        workload=workload,
        precision=precision,
        rows=rows,
        length=length,
        supervised=16,
        recomputed=recomputed,
        adapter=AdapterSettings(r=8, alpha=16, dropout=0.0),
        quantization=QuantizationSettings() if workload == "qlora" else None,
    )
    measure = measure_as_deepspeed if arithmetic == "zero2" else measure_on_cpu
    peak, held = measure(step, tmp_path)

    setup = setup_for(
        workload.split()[0],
        trainable=TRAINABLE[workload],
        strategy="zero2" if arithmetic == "zero2" else "single",
        precision=precision,
        micro_batch_size=rows,
        row_tokens=length,
        row_supervised=16,
        recomputed_blocks=recomputed,
        adapter_rank=8,
        adapter_dropout=False,
        attention="flash_attention_2",  # whole rows have no mask
        fused_optimizer=True,
        bits=4 if workload == "qlora" else None,
    )
    memory = device_memory(architecture_of(step.config), setup)
    for name, size in held.items():
        # Few bits have their scales elsewhere.
        if (workload, name) != ("qlora", "weights"):
            assert getattr(memory, name) == pytest.approx(size, rel=0.02), name
    assert peak > 0
    # ZeRO's buckets of gradients are no part of the passes.
    found = memory.activations + (0.0 if setup.is_zero else memory.working)
    assert found == pytest.approx(peak, rel=0.15)


def test_autocast_keeps_no_copies_of_what_is_recomputed():
    """7B in full on one device: copies of the head and of the projector, and of one block."""
    tower, layers = PUBLISHED
    architecture = published_architecture(tower, "lmsys/vicuna-7b-v1.5", layers)
    setup = setup_for(
        "full",
        precision="bf16-mixed",
        row_tokens=2048,
        row_supervised=800,
        attention="flash_attention_2",
        fused_optimizer=True,
    )
    memory = device_memory(architecture, setup)
    # Of 6 776 707 072 trained weights a cache of copies alone would be 12.6 GiB.
    assert (memory.activations + memory.working) / 2**30 < 6


def test_a_real_size_under_every_strategy():
    """13B in full on eight devices: 13 068 968 960 trained weights, 303 507 456 frozen ones."""
    tower, layers = PUBLISHED
    architecture = published_architecture(tower, "lmsys/vicuna-13b-v1.5", layers)
    trained, frozen = 13_068_968_960, 303_507_456
    every = trained + frozen
    expected = {
        "ddp": (4 * trained + 2 * frozen, 4 * trained, 8 * trained, 0),
        "fsdp2": (trained / 2 + frozen / 4, trained / 2, trained, 0),
        "zero2": (2 * every, trained / 4, 12 * trained / 8, 0),
        "zero3": (every / 4, trained / 4, 12 * trained / 8, 0),
        "zero3_offload": (every / 4, 0, 0, 18 * trained),
    }
    for strategy, (weights, gradients, optimizer, host) in expected.items():
        setup = setup_for("full", strategy=strategy, precision="bf16-mixed", num_devices=8)
        memory = device_memory(architecture, setup)
        found = (memory.weights, memory.gradients, memory.optimizer, memory.host)
        assert found == (weights, gradients, optimizer, host), strategy


def test_four_bits_replace_the_blocks_linear_layers_only():
    """7B: 6 476 005 376 weights of linear layers; the rest is bf16, or float32 if it trains."""
    tower, layers = PUBLISHED
    architecture = published_architecture(tower, "lmsys/vicuna-7b-v1.5", layers)
    setup = setup_for(
        "lora", precision="bf16-mixed", adapter_rank=128, strategy="ddp", num_devices=8
    )
    setup = replace(setup, workload="qlora", bits=4)
    few, others = 6_476_005_376, 6_738_939_904 - 6_476_005_376 + 303_507_456
    trained = 37_767_168 + 319_815_680
    memory = device_memory(architecture, setup)
    assert memory.weights == pytest.approx(4 * trained + 2 * others + 0.5159 * few, rel=1e-4)
    eight = device_memory(architecture, replace(setup, bits=8))
    assert eight.weights - memory.weights == pytest.approx((1 - 0.5159) * few, rel=1e-3)


def test_more_needs_more():
    tower, layers = PUBLISHED
    architecture = published_architecture(tower, "meta-llama/Meta-Llama-3-8B-Instruct", layers)
    setup = setup_for(
        "full",
        strategy="zero2",
        precision="bf16-mixed",
        num_devices=8,
        row_tokens=2048,
        micro_batch_size=8,
    )

    def total(**changes: object) -> float:
        return device_memory(architecture, replace(setup, **changes)).total

    assert total(micro_batch_size=16) > total()
    # A small step's peak is in the optimizer: its temporaries.
    small = total(micro_batch_size=1)
    assert small - total(micro_batch_size=1, fused_optimizer=True) > 2e9
    assert total(row_tokens=4096) > total()
    assert total(recomputed_blocks=0) > total()
    assert total(num_devices=16) < total()
    assert total(strategy="zero3") < total()
    # Without recomputing there is a mask for every block, and keys and values are repeated.
    plain = {"recomputed_blocks": 0, "micro_batch_size": 4}
    flash, sdpa = total(**plain, attention="flash_attention_2"), total(**plain, attention="sdpa")
    assert total(**plain, attention="torch_varlen") == flash
    assert flash < sdpa < total(**plain, attention="eager")


def test_the_overhead_is_told_apart():
    memory = DeviceMemory(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, host=7.0)
    assert (memory.allocated, memory.total) == (15.0, 21.0)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match="strategy='zero4' is not one of single, ddp"):
        setup_for("full", strategy="zero4")


CASES = [
    ("fsdp2", "full"),
    # DeepSpeed takes half a minute to start here.
    pytest.param("zero2", "lora", marks=pytest.mark.slow),
    pytest.param("zero3", "full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("strategy", "workload"), CASES)
def test_a_rank_of_two_holds_what_is_forecast(tiny_sources, tmp_path, strategy, workload):
    if strategy != "fsdp2":
        pytest.importorskip("deepspeed")
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.language_model,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
        dtype="float32" if strategy == "fsdp2" else "bfloat16",  # as vip.weights_dtype
    )
    job = {
        "folder": str(tmp_path),
        "strategy": strategy,
        "spec": asdict(spec),
        "trainable": list(WORKLOADS[workload]),
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0} if workload == "lora" else None,
    }
    _run_two(job, tmp_path)

    config = network_config(
        CLIPVisionConfig.from_pretrained(spec.vision_tower),
        LlamaConfig.from_pretrained(spec.language_model),
        feature_layers=spec.feature_layers,
        num_tokens=261,
        image_token_id=259,
    )
    setup = setup_for(workload, strategy=strategy, precision="bf16-mixed", num_devices=2)
    memory = device_memory(architecture_of(config), setup)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    for held in ranks:
        # Weights are cut into equal parts, and padded: tiny ones are noticed.
        assert memory.weights == pytest.approx(held["weights"], rel=0.05)
        assert memory.optimizer == pytest.approx(held["optimizer"], rel=0.05)
        if strategy != "zero2":  # its gradients are gone after the step
            assert memory.gradients == pytest.approx(held["gradients"], rel=0.05)


def _run_two(job: dict, folder: Path) -> None:
    (folder / "job.json").write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        preloaded.Popen(
            [sys.executable, "-m", "tests.forecast.memory_job", str(folder / "job.json")],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)


def test_buffers_of_deepspeed_are_those_of_the_configuration():
    folder = ROOT / "conf" / "strategy"
    files = {name: OmegaConf.load(folder / f"{name}.yaml") for name in SHARDING_STRATEGIES}
    zero = {name: file.lightning.config.zero_optimization for name, file in files.items()}
    assert {z.reduce_bucket_size for z in zero.values()} == {forecast._BUCKET}
    for name in ("zero3", "zero3_offload"):
        live = zero[name].stage3_max_live_parameters + zero[name].stage3_prefetch_bucket_size
        assert (zero[name].sub_group_size, live) == (forecast._SUB_GROUP, forecast._LIVE)
