"""Real Lightning steps on a tiny model: what moves, what is logged, and that numbers agree."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.types import ConfigError, VipLlavaError

pytestmark = LIGHTNING_WARNINGS

STAGES = {
    "pretrain": ["projector"],
    "finetune": ["projector", "language_model"],  # and gpt4v
}
PREFIXES = {
    "projector": ("model.model.multi_modal_projector.",),
    "language_model": ("model.model.language_model.", "model.lm_head."),
    "vision_tower": ("model.model.vision_tower.",),
}


def _metrics(trainer) -> list[dict[str, float]]:
    trainer.logger.save()
    with Path(trainer.logger.log_dir, "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


class Gradients(Callback):
    """Copies the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_stage_changes_its_parts_and_nothing_else(
    make_module, make_trainer, stage, gradient_checkpointing
):
    module = make_module(
        trainable=STAGES[stage], weight_decay=0.1, gradient_checkpointing=gradient_checkpointing
    )
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    make_trainer().fit(module, Loader(make_samples(12), 3, 1))

    moving = tuple(p for part in STAGES[stage] for p in PREFIXES[part])
    assert len(before) == 82
    for name, parameter in module.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == name.startswith(moving), name
    assert {name for name, _ in module.named_buffers()} == set(buffers)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_equal_seeds_give_identical_logs(make_module, make_trainer):
    texts = []
    for folder in ("a", "b"):
        torch.manual_seed(len(texts))  # what was drawn before must not matter
        trainer = make_trainer(folder)
        trainer.fit(make_module(), Loader(make_samples(12), 3, 1))
        trainer.logger.save()
        texts.append(Path(trainer.logger.log_dir, "metrics.csv").read_text())
    other = make_trainer("c")
    other.fit(make_module(seed=4), Loader(make_samples(12), 3, 1))

    assert texts[0] == texts[1] != ""
    assert texts[0].splitlines()[0].split(",") == list(_metrics(other)[0])
    assert texts[0] != Path(other.logger.log_dir, "metrics.csv").read_text()


def test_accumulation_gives_the_same_loss_and_gradients(make_module, make_trainer):
    """Also where one micro-batch is all text, and with few and many supervised tokens."""
    samples = make_samples(16, text_only=lambda i: 4 <= i < 6)
    found = {}
    for accumulate in (1, 4):
        gradients = Gradients()
        trainer = make_trainer(
            f"accumulate{accumulate}", accumulate_grad_batches=accumulate, callbacks=[gradients]
        )
        trainer.fit(make_module(), Loader(samples, 8 // accumulate, accumulate))
        found[accumulate] = (gradients.steps, _metrics(trainer))

    assert [len(steps) for steps, _ in found.values()] == [2, 2]
    for key in ("train/loss", "train/grad_norm", "train/supervised_tokens", "train/lr", "step"):
        values = [[row[key] for row in metrics] for _, metrics in found.values()]
        assert values[0] == pytest.approx(values[1], rel=1e-6), key
    for whole, parts in zip(found[1][0], found[4][0], strict=True):
        assert whole.keys() == parts.keys()
        for name, gradient in whole.items():
            assert (parts[name] - gradient).abs().max() <= 1e-6, name


def test_logs_once_per_optimizer_step_the_mean_over_supervised_tokens(make_module, make_trainer):
    samples = make_samples(16)
    module = make_module(warmup_ratio=0.5, learning_rate=1e-2)
    module.configure_model()
    network = module.network
    total = torch.zeros(())
    with torch.no_grad():
        for sample in samples[:8]:
            pixels = sample["pixels"]
            logits = network(
                input_ids=torch.tensor([sample["prompt"] + sample["answer"]]),
                pixel_values=None
                if pixels is None
                else normalise_pixels(pixels[None], torch.float32, CLIP.preprocessing),
            ).logits[0]
            start = len(sample["prompt"])
            target = torch.tensor(sample["answer"])
            total += functional.cross_entropy(logits[start - 1 : -1], target, reduction="sum")
    num_tokens = [sum(len(s["answer"]) for s in group) for group in (samples[:8], samples[8:])]

    trainer = make_trainer(accumulate_grad_batches=4, gradient_clip_val=1e-3)
    trainer.fit(module, Loader(samples, 2, 4))

    metrics = _metrics(trainer)
    assert [row["step"] for row in metrics] == [0, 1]
    assert metrics[0]["train/loss"] == pytest.approx(total.item() / num_tokens[0], rel=1e-6)
    assert [row["train/supervised_tokens"] for row in metrics] == num_tokens
    # One step of warm-up out of two: the first step has rate 0, the second the peak.
    assert [row["train/lr"] for row in metrics] == pytest.approx([0.0, 1e-2])
    # Of the gradient itself: it is clipped to a thousandth afterwards.
    assert min(row["train/grad_norm"] for row in metrics) > 1e-2


def test_a_strategy_that_rounds_rotary_frequencies_is_refused(make_module, make_trainer):
    """As DeepSpeed did: without an error, the run would learn another embedding."""
    trainer = make_trainer(precision="bf16-true")
    with pytest.raises(
        VipLlavaError, match=r"rotary_emb\.inv_freq is torch\.bfloat16.*deepspeed>="
    ):
        trainer.fit(make_module(), Loader(make_samples(8), 4, 1))


def test_training_lowers_the_loss(make_module, make_trainer):
    trainer = make_trainer(max_epochs=15)
    trainer.fit(make_module(), Loader(make_samples(8), 4, 1))

    losses = [row["train/loss"] for row in _metrics(trainer)]
    assert losses[0] > math.log(259) - 1
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_parts_stay_in_eval_mode(make_module):
    module = make_module(trainable=["projector"])
    module.configure_model()
    module.train()

    assert module.network.model.multi_modal_projector.training
    for frozen in (
        module.network.model.vision_tower,
        module.network.model.language_model,
        module.network.lm_head,
    ):
        assert not any(m.training for m in frozen.modules())
    module.eval()
    assert not module.network.model.multi_modal_projector.training


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_gradient_checkpointing_recomputes_the_blocks_and_changes_nothing(
    make_module, make_trainer, trainable
):
    calls, steps = {}, {}
    for checkpointed in (False, True):
        module = make_module(trainable=trainable, gradient_checkpointing=checkpointed)
        module.configure_model()
        counts = []
        module.network.model.language_model.layers[0].self_attn.register_forward_hook(
            lambda *_, counts=counts: counts.append(1)
        )
        gradients = Gradients()
        make_trainer(str(checkpointed), callbacks=[gradients]).fit(
            module, Loader(make_samples(4), 2, 1)
        )
        calls[checkpointed], steps[checkpointed] = len(counts), gradients.steps

    assert calls == {False: 2, True: 4}
    for plain, recomputed in zip(steps[False], steps[True], strict=True):
        assert plain.keys() == recomputed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_network_is_built_once(make_module):
    module = make_module()
    with pytest.raises(VipLlavaError, match="not built yet"):
        _ = module.network
    module.configure_model()
    network = module.network
    module.configure_model()
    assert module.network is network


def test_a_loss_that_is_not_finite_names_the_samples(make_module, make_trainer):
    module = make_module()
    module.configure_model()
    with torch.no_grad():
        module.network.lm_head.weight[5] = math.nan

    with pytest.raises(VipLlavaError, match=r"the loss is nan at step 0; .*set/0, set/1, set/2"):
        make_trainer().fit(module, Loader(make_samples(3), 3, 1))


def test_a_global_batch_without_supervision_names_the_samples(make_module, make_trainer):
    samples = [sample | {"answer": []} for sample in make_samples(2)]
    with pytest.raises(VipLlavaError, match=r"\['set/0', 'set/1'\] has no supervised token"):
        make_trainer().fit(make_module(), Loader(samples, 2, 1))


def test_checkpoints_leave_frozen_weights_out_and_resume(make_module, make_trainer, tmp_path):
    def fit(folder, max_epochs, resume=None):
        module = make_module(trainable=["projector"], schedule="constant")
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = make_trainer(
            folder, max_epochs=max_epochs, callbacks=[saver], enable_checkpointing=True
        )
        trainer.fit(module, Loader(make_samples(4), 2, 1), ckpt_path=resume)
        return module, saver.last_model_path

    _, path = fit("first", 1)
    resumed, _ = fit("second", 2, resume=path)
    whole, _ = fit("whole", 2)

    keys = torch.load(path, weights_only=True)["state_dict"]
    assert len(keys) == 6
    assert all(key.startswith("model.model.multi_modal_projector.") for key in keys)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_settings_are_checked_before_anything_is_loaded(make_module):
    with pytest.raises(ConfigError, match="vision_tower, projector, language_model"):
        make_module(trainable=["tower"])
    with pytest.raises(ConfigError, match="schedule='step' is unknown"):
        make_module(schedule="step")
