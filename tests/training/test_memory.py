"""The memory forecast against what real runs of a tiny network hold."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from lightning.pytorch.callbacks import Callback
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaForConditionalGeneration

from tests.training.memory_meter import MemoryMeter
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.models.adapters import AdapterSettings, add_adapters
from vipllava.models.architecture import architecture_of
from vipllava.models.blocks import recompute_blocks, train_recomputed
from vipllava.models.building import ModelSpec, network_config
from vipllava.models.freezing import hold_frozen, set_trainable
from vipllava.models.published import published_architecture
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.training.memory import DeviceMemory, Setup, device_memory, parameter_rows
from vipllava.types import Batch, ConfigError

pytestmark = LIGHTNING_WARNINGS
ROOT = Path(__file__).resolve().parents[2]
BOTH = ("projector", "language_model")
WORKLOADS = {"projector": ("projector",), "full": BOTH, "lora": BOTH}
PUBLISHED = ("openai/clip-vit-large-patch14-336", (-2, -5, -8, -11, 6))


def setup_for(workload: str, **changes: object) -> Setup:
    values: dict = {
        "trainable": WORKLOADS[workload],
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
        state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        parameters = list(pl_module.network.parameters())
        self.weights = sum(p.nbytes for p in parameters)
        self.gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        self.optimizer = sum(t.nbytes for t in state)


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
    assert held.weights > 0
    assert memory.weights == pytest.approx(held.weights, rel=0.02)
    assert memory.gradients == pytest.approx(held.gradients, rel=0.02)
    assert memory.optimizer == pytest.approx(held.optimizer, rel=0.02)
    rows = {row.part: row.num_trainable for row in parameter_rows(architecture, setup)}
    assert 4 * sum(rows.values()) == held.gradients


SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3}
ARITHMETIC = {
    # How a strategy computes: its setup, the weights' dtype, what autocast does.
    "single": ({"strategy": "single", "precision": "bf16-mixed"}, torch.float32, torch.bfloat16),
    "zero2": ({"strategy": "zero2", "precision": "bf16-mixed"}, torch.bfloat16, None),
    "float32": ({"strategy": "single", "precision": "32-true"}, torch.float32, None),
}


@pytest.mark.parametrize("recomputed", [None, 2, 0], ids=["all", "two", "none"])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_activations_are_those_of_a_real_pass(arithmetic, workload, recomputed):
    """Forward and backward of a Llama, every tensor counted while it lives."""
    changes, dtype, autocast = ARITHMETIC[arithmetic]
    rows, length, supervised = 2, 256, 16
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=512, num_attention_heads=4, num_key_value_heads=4, pad_token_id=None, **SIZES
    )
    config = network_config(
        tower, text, feature_layers=(-1, 1), num_tokens=512, image_token_id=511, image_seq_length=16
    )
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    if workload == "lora":
        add_adapters(model, AdapterSettings(r=8, alpha=16, dropout=0.0))
    set_trainable(model, list(WORKLOADS[workload]))
    model.to(dtype)
    if autocast:
        hold_frozen(model, autocast)
    recompute_blocks(model, recomputed)
    train_recomputed(model)
    ids = torch.randint(0, 510, (rows, length))
    ids[:, 1:17] = 511
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = ids[:, -supervised:]
    places = torch.arange(length).repeat(rows, 1)
    pixels = torch.randint(0, 256, (rows, 3, 56, 56), dtype=torch.uint8)
    batch = Batch(ids, labels, places, torch.zeros_like(ids), pixels, rows * supervised)

    with MemoryMeter() as meter:
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            loss, _ = supervised_loss_sum(model, batch)
        loss.backward()

    setup = setup_for(
        workload,
        micro_batch_size=rows,
        row_tokens=length,
        row_supervised=supervised,
        recomputed_blocks=recomputed,
        adapter_rank=8,
        adapter_dropout=False,
        attention="flash_attention_2",  # whole rows have no mask
        fused_optimizer=True,
        **changes,
    )
    memory = device_memory(architecture_of(config), setup)
    found = memory.activations
    if setup.strategy == "single":  # no buckets: what autocast caches is all the rest
        found += memory.working
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert meter.peak > 0
    # Gradients appear while activations go; the meter sees some of them at the peak.
    assert meter.peak - gradients < found * 1.05
    assert found == pytest.approx(meter.peak, rel=0.15)


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
        image_seq_length=4,
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
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.memory_job", str(folder / "job.json")],
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
