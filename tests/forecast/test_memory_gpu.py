"""The forecast of a step's peak against what a CUDA device measures; `pytest -m gpu`.

The same steps as on the CPU, through Lightning's Trainer: a mid-size network with random weights,
wide enough that a block's tensors are what they are at 7B, small enough to be made in seconds.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from lightning.pytorch.callbacks import Callback
from transformers import CLIPVisionConfig, LlamaConfig

from tests.forecast.measured_step import TRAINABLE, Step, train_steps
from tests.training.toy_training import LIGHTNING_WARNINGS
from vipllava.forecast.architecture import architecture_of
from vipllava.forecast.memory import Setup, device_memory
from vipllava.models.adapters import AdapterSettings
from vipllava.models.building import network_config
from vipllava.models.quantization import QuantizationSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *LIGHTNING_WARNINGS,
]
ROWS, LENGTH, SUPERVISED, PATCHES = 8, 1024, 128, 576


class Peak(Callback):
    """Has the allocator count from the first step on, and notes how the optimizer steps."""

    peak = 0
    fused = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        (optimizer,) = trainer.optimizers
        self.fused = bool(optimizer.param_groups[0].get("fused"))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.peak = torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("recomputed", [None, 8, 0], ids=["all", "half", "none"])
@pytest.mark.parametrize("workload", ["projector", "full", "lora", "qlora"])
def test_the_peak_is_within_15_percent(workload, recomputed, tmp_path):
    if workload == "qlora":
        pytest.importorskip("bitsandbytes")
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        pad_token_id=None,
    )
    config = network_config(
        tower,
        text,
        feature_layers=(-2, -5, -8, -11, 6),
        num_tokens=32002,
        image_token_id=32000,
    )
    step = Step(
        config=config,
        workload=workload,
        precision="bf16-mixed",
        rows=ROWS,
        length=LENGTH,
        supervised=SUPERVISED,
        recomputed=recomputed,
        adapter=AdapterSettings(r=128, alpha=256, dropout=0.05),
        quantization=QuantizationSettings() if workload == "qlora" else None,
    )
    gc.collect()
    torch.cuda.empty_cache()
    watch = Peak()
    module = train_steps(step, tmp_path, "cuda", watch, num_steps=2)
    del module
    gc.collect()
    torch.cuda.empty_cache()

    setup = Setup(
        trainable=TRAINABLE[workload],
        workload=workload,
        strategy="single",
        precision="bf16-mixed",
        num_devices=1,
        micro_batch_size=ROWS,
        row_tokens=LENGTH,
        row_supervised=SUPERVISED,
        recomputed_blocks=recomputed,
        attention="flash_attention_2",  # whole rows have no mask, and sdpa is flash then
        adapter_rank=128,
        bits=4 if workload == "qlora" else None,
        fused_optimizer=watch.fused,
    )
    memory = device_memory(architecture_of(config), setup)
    print(  # noqa: T201 - the record
        f"{workload}, recomputed {recomputed}: measured {watch.peak / 2**30:.2f} GiB, "
        f"forecast {memory.allocated / 2**30:.2f} GiB ({memory.allocated / watch.peak:.3f})"
    )
    assert memory.allocated == pytest.approx(watch.peak, rel=0.15)
