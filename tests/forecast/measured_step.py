"""One training step of a network with random weights, by Lightning's own Trainer, and its memory.

The forecast is compared with the program that runs: its precision plugin, its order of things. On
the CPU every tensor is counted while it lives, on a CUDA device the allocator counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.forecast.memory_meter import MemoryMeter
from vipllava.models.adapters import AdapterSettings
from vipllava.models.blocks import decoder_blocks
from vipllava.models.building import ModelSpec, network_config
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.optim import OptimizerSettings
from vipllava.types import Batch

PROJECTOR, BOTH = ("projector",), ("projector", "language_model")
TRAINABLE = {
    "projector": PROJECTOR,
    "full": BOTH,
    "lora": BOTH,
    "qlora": BOTH,
    "projector and tower": ("vision_tower", "projector"),
    "full and tower": ("vision_tower", *BOTH),
}
"""The parts of a workload, whose first word is the forecast's."""


@dataclass(frozen=True)
class Step:
    """What is measured.

    Attributes:
        config: of the network.
        workload: of :data:`TRAINABLE`.
        precision: of the trainer.
        rows: of the batch, all of one length.
        length: tokens of a row, one picture's among them.
        supervised: at the end of each row.
        recomputed: decoder blocks; None: all.
        adapter: of LoRA.
        quantization: of the language model's weights.
        attention: as transformers names it.
    """

    config: VipLlavaConfig
    workload: str
    precision: str
    rows: int
    length: int
    supervised: int
    recomputed: int | None = None
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    quantization: Any = None
    attention: str = "sdpa"

    def batch(self) -> Batch:
        """Return random rows without padding."""
        config: Any = self.config
        image, patches = config.image_token_id, config.image_seq_length
        side = config.vision_config.image_size
        ids = torch.randint(0, image, (self.rows, self.length))
        ids[:, 1 : 1 + patches] = image
        labels = torch.full_like(ids, -100)
        labels[:, -self.supervised :] = ids[:, -self.supervised :]
        return Batch(
            ids,
            labels,
            torch.arange(self.length).repeat(self.rows, 1),
            torch.zeros_like(ids),
            torch.randint(0, 256, (self.rows, 3, side, side), dtype=torch.uint8),
            self.rows * self.supervised,
            keys=tuple(f"random/{row}" for row in range(self.rows)),
        )


def small_config(width: int, feature_layers: tuple[int, ...] = (-1, 1)) -> VipLlavaConfig:
    """Return a network of three blocks, in the tower, too; a few megabytes in all.

    Args:
        width: of the language model.
        feature_layers: of the tower.
    """
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
    )
    return network_config(
        tower,
        text,
        feature_layers=feature_layers,
        num_tokens=512,
        image_token_id=511,
    )


class Module(VipLlavaLitModule):
    """The module of every run, around a network with random weights."""

    def __init__(self, step: Step, folder: Path, device: str) -> None:
        adapts = step.workload in ("lora", "qlora")
        super().__init__(
            ModelSpec(str(folder), str(folder), (0,), "plain", 0),
            TRAINABLE[step.workload],
            OptimizerSettings(1e-5),
            gradient_checkpointing=True if step.recomputed is None else step.recomputed,
            adapter=step.adapter if adapts else None,
        )
        self.step, self.on = step, device

    def _build(self, *_: Any, **__: Any) -> VipLlavaForConditionalGeneration:
        make: Any = VipLlavaForConditionalGeneration._from_config
        with torch.device(self.on):
            torch.manual_seed(0)
            model = make(self.step.config, attn_implementation=self.step.attention).eval()
        if self.step.quantization is not None:
            _quantize(model, self.step.quantization)
        return model


class Watch(Callback):
    """Notes the peak of a micro-batch, forward and backward, and what is held behind the step.

    Of the second one of a step: it finds the gradients there already, so nothing but activations
    and what comes and goes is counted.
    """

    def __init__(self) -> None:
        self.meter = MemoryMeter()
        self.peak = 0
        self.held: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.meter.__enter__()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 1:
            self.meter.__exit__(None, None, None)
            self.peak = self.meter.peak

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.held = held_bytes(pl_module.network, optimizer)


def held_bytes(network: Any, optimizer: Any) -> dict[str, int]:
    """Return the bytes of weights, gradients and what the optimizer keeps."""
    parameters = list(network.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(t.nbytes for t in state),
    }


def _quantize(model: Any, settings: Any) -> None:
    """Put the decoder blocks' linear layers in 4 bits, as transformers does while it loads."""
    import bitsandbytes as bnb

    for block in decoder_blocks(model):
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, torch.nn.Linear):
                continue
            few = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=settings.double_quantization,
                quant_type=settings.type,
            )
            few.weight = bnb.nn.Params4bit(
                layer.weight.data.to(torch.bfloat16),
                requires_grad=False,
                compress_statistics=settings.double_quantization,
                quant_type=settings.type,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(parent), attribute, few.to(layer.weight.device))


def train_steps(step: Step, folder: Path, device: str, watch: Callback, num_steps: int) -> Module:
    """Train a few steps of two micro-batches, as a run does."""
    module = Module(step, folder, device)
    trainer = lightning.Trainer(
        accelerator=device,
        devices=1,
        precision=step.precision,
        max_steps=num_steps,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
    )
    trainer.fit(module, DataLoader([step.batch()] * (2 * num_steps), batch_size=None))
    return module


def measure_on_cpu(step: Step, folder: Path) -> tuple[int, dict[str, int]]:
    """Return the peak of forward and backward pass, and what is held behind a step, in bytes."""
    watch = Watch()
    train_steps(step, folder, "cpu", watch, 1)
    return watch.peak, watch.held


def measure_as_deepspeed(step: Step, folder: Path) -> tuple[int, dict[str, int]]:
    """Return the same of the passes inside DeepSpeed: all weights in half, and no autocast.

    Its engine wants a process group; its precision plugin says what happens around a pass.
    """
    module = Module(step, folder, "cpu")
    module.configure_model()
    network = module.network.to(torch.bfloat16)
    module.train()
    plugin, batch = DeepSpeedPrecision(step.precision), step.batch()  # type: ignore[arg-type]

    def passes() -> None:
        with plugin.train_step_context():
            loss, _ = supervised_loss_sum(network, batch)
        loss.backward()

    passes()
    with MemoryMeter() as meter:
        passes()
    return meter.peak, {}
