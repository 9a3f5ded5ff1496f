"""The fused AdamW of a CUDA run, which works on the CPU, clips and trains as the other one does."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.models.adapters import AdapterSettings
from vipllava.models.quantization import QuantizationSettings
from vipllava.training import lit_module
from vipllava.training.optim import uses_fused_adamw

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:.*:FutureWarning")]
SMALL = AdapterSettings(r=4, alpha=8, dropout=0.0)


def train(make_module, trainer, **module) -> tuple[list[dict[str, float]], torch.optim.Optimizer]:
    trainer.fit(make_module(**module), Loader(make_samples(24), 2, 1))
    with Path(trainer.logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows, trainer.optimizers[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_fused_step_is_clipped_and_gives_the_same_losses(
    make_module, make_trainer, monkeypatch, precision, tuning
):
    tunings = {"full": {}, "lora": {"adapter": SMALL}, "qlora": {"adapter": SMALL}}
    module = tunings[tuning]
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
        half = "bfloat16" if precision == "bf16-mixed" else "float32"
        module = module | {"quantization": QuantizationSettings(compute_dtype=half)}
    found = {}
    for device_type in ("cpu", "cuda"):
        # What is decided for a CUDA device, on this one.
        monkeypatch.setattr(
            lit_module.optim,
            "uses_fused_adamw",
            lambda _, precision, here=device_type: uses_fused_adamw(here, precision),
        )
        trainer = make_trainer(device_type, precision=precision, gradient_clip_val=0.05)
        found[device_type], optimizer = train(make_module, trainer, **module)
        assert optimizer.defaults["fused"] == (True if device_type == "cuda" else None)

    assert len(found["cpu"]) == 12
    near = 1e-5 if precision == "32-true" else 5e-3
    for plain, fused in zip(found["cpu"], found["cuda"], strict=True):
        assert plain["train/grad_norm"] > 0.05  # every step is clipped
        assert fused == pytest.approx(plain, rel=near)


def test_what_is_clipped_is_what_lightning_would_clip(make_module, make_trainer, monkeypatch):
    found = []
    for name in ("ours", "lightning"):
        if name == "lightning":
            monkeypatch.delattr(lit_module.VipLlavaLitModule, "configure_gradient_clipping")
        trainer = make_trainer(name, gradient_clip_val=0.05, accumulate_grad_batches=2)
        trainer.fit(make_module(), Loader(make_samples(24), 1, 2))
        found.append(Path(trainer.logger.log_dir, "metrics.csv").read_text())

    assert found[0] == found[1]


def test_clipping_by_value_is_by_value(make_module, make_trainer):
    greatest = []

    class Module(lit_module.VipLlavaLitModule):
        def optimizer_zero_grad(self, *_) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            greatest.extend(float(gradient.abs().max()) for gradient in gradients)
            super().optimizer_zero_grad(*_)

    module = make_module()
    module.__class__ = Module
    trainer = make_trainer(gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    trainer.fit(module, Loader(make_samples(8), 2, 1))

    assert max(greatest) == pytest.approx(1e-3)


def test_with_loss_scaling_the_norm_is_that_of_the_unscaled_gradient(
    make_module, make_trainer, monkeypatch
):
    decided = []

    def decide(_, precision):
        decided.append((precision, uses_fused_adamw("cuda", precision)))
        return decided[-1][1]

    monkeypatch.setattr(lit_module.optim, "uses_fused_adamw", decide)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer("half", plugins=[half], gradient_clip_val=0.05)
    scaled, _ = train(make_module, trainer)
    trainer = make_trainer("whole", gradient_clip_val=0.05)
    whole, _ = train(make_module, trainer)

    assert decided == [("16-mixed", False), ("32-true", True)]
    for row, expected in zip(scaled, whole, strict=True):
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=5e-2)
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-2)
