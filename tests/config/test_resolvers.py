from __future__ import annotations

from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vipllava.config import resolvers
from vipllava.config.composing import compose_job
from vipllava.models.quantization import quantization_config


def _resolve(*overrides: str, keys: tuple[str, ...]) -> list[object]:
    cfg = compose_job(list(overrides))
    return [OmegaConf.select(cfg, key) for key in keys]


def test_default_job_on_a_laptop():
    keys = ("name", "run_dir", "trainer.devices", "trainer.precision", "strategy.name", "seed")
    assert _resolve(keys=keys) == [
        "tiny-pretrain",
        "runs/tiny-pretrain",
        1,
        "32-true",
        "single",
        42,
    ]


@pytest.mark.parametrize("here", ["bf16_server"], indirect=True)
def test_auto_uses_bf16_units_of_a_cpu_and_cpu_keeps_full_precision():
    assert _resolve(keys=("trainer.precision",)) == ["bf16-mixed"]
    assert _resolve("trainer=cpu", keys=("trainer.precision",)) == ["32-true"]


@pytest.mark.parametrize("here", ["2xt4"], indirect=True)
def test_auto_takes_the_devices_that_are_there():
    keys = ("trainer.devices", "trainer.precision", "strategy.name", "machine.micro_batch_size")
    assert _resolve(keys=keys) == [2, "16-mixed", "ddp", 32]


@pytest.mark.parametrize("here", ["6xa100"], indirect=True)
def test_auto_leaves_out_devices_that_do_not_divide_the_global_batch():
    assert _resolve(keys=("trainer.devices", "trainer.precision")) == [4, "bf16-mixed"]


@pytest.mark.parametrize(
    ("job", "strategy", "micro", "steps"),
    [
        ("stage=pretrain model=13b trainer=8xa100", "zero2", 32, 1),
        ("stage=finetune model=13b trainer=8xa100", "zero2", 16, 1),
        ("stage=finetune model=llama3_8b trainer=8xa100", "zero3", 8, 2),
        ("stage=gpt4v model=phi3_mini trainer=8xa100", "zero3", 8, 2),
        ("stage=pretrain model=llama3_8b trainer=8xa100", "zero2", 32, 1),
        ("stage=finetune model=llama3_8b trainer=8xa100 tuning=lora", "zero2", 16, 1),
        ("stage=finetune model=7b trainer=8xrtx3090", "zero3_offload", 2, 8),
        ("stage=finetune model=7b trainer=8xrtx3090 tuning=lora", "zero3", 4, 4),
        ("stage=finetune model=llama3_8b trainer=8xrtx3090 tuning=qlora", "ddp", 8, 2),
        ("stage=pretrain model=7b trainer=8xv100", "zero2", 16, 2),
        ("stage=finetune model=7b trainer=multinode", "zero2", 8, 1),
        ("stage=finetune model=7b trainer=8xa100 strategy=fsdp2", "fsdp2", 16, 1),
        ("stage=finetune trainer=8xa100", "ddp", 8, 1),
    ],
)
def test_strategy_and_micro_batch_by_machine_and_model(
    job: str, strategy: str, micro: int, steps: int
):
    keys = ("strategy.name", "machine.micro_batch_size", "trainer.accumulate_grad_batches")
    assert _resolve(*job.split(), keys=keys) == [strategy, micro, steps]


def test_auto_strategy_is_the_preset_itself():
    auto = compose_job(["stage=finetune", "model=7b", "trainer=8xa100"])
    named = compose_job(["stage=finetune", "model=7b", "trainer=8xa100", "strategy=zero2"])
    resolved = [OmegaConf.to_container(c, resolve=True)["trainer"] for c in (auto, named)]
    assert resolved[0] == resolved[1]
    assert resolved[0]["strategy"]["config"]["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("job", "rate", "projector"),
    [
        ("model=7b stage=pretrain", 1e-3, None),
        ("model=7b stage=finetune", 2e-5, None),
        ("model=7b stage=gpt4v", 2e-7, None),
        ("model=7b stage=finetune tuning=lora", 2e-4, 2e-5),
        ("model=7b stage=finetune tuning=qlora", 2e-4, 2e-5),
        ("model=7b stage=finetune tuning=lora stage.learning_rate=3e-4", 3e-4, 2e-5),
        ("model=tiny stage=finetune stage.learning_rate=5e-5", 5e-5, None),
    ],
)
def test_learning_rates(job: str, rate: float, projector: float | None):
    keys = ("module.optimizer.learning_rate", "module.optimizer.projector_learning_rate")
    assert _resolve(*job.split(), keys=keys) == [rate, projector]


def test_tiny_brings_its_own_recipe():
    keys = ("stage.global_batch_size", "stage.max_length", "stage.gradient_checkpointing")
    assert _resolve(keys=keys) == [64, 512, False]
    assert _resolve("model=7b", keys=keys) == [256, 2048, "auto"]


def test_marks_follow_the_model():
    keys = ("data.policies.ranges.anchor", "data.policies.ranges.rectangle_width")
    assert _resolve(keys=keys) == [168, [3, 5]]
    assert _resolve("model=7b", keys=keys) == [336, [2, 8]]
    assert _resolve("visual_prompts=published", keys=keys) == [336, [2, 8]]


def test_null_overrides_count(monkeypatch: pytest.MonkeyPatch):
    cfg = OmegaConf.create(
        {
            "stage": {"name": "x", "clip": "${vip.recipe:gradient_clip,1.0}"},
            "model": {"stage_overrides": {"x": {"gradient_clip": None}}},
        }
    )
    resolvers.register_resolvers()
    assert cfg.stage.clip is None


def test_clipping_reaches_every_strategy():
    for strategy in ("zero2", "zero3", "zero3_offload"):
        for clip, number in (("1.0", 1.0), ("null", 0.0)):
            cfg = compose_job(
                [
                    "model=7b",
                    "trainer=8xa100",
                    f"strategy={strategy}",
                    f"stage.gradient_clip={clip}",
                ]
            )
            config = OmegaConf.to_container(cfg.trainer.strategy.config, resolve=True)
            assert config["gradient_clipping"] == number  # type: ignore[index]
            assert cfg.trainer.gradient_clip_val == (1.0 if number else None)


def test_offload_moves_the_optimizer_only():
    cfg = compose_job(["model=7b", "trainer=8xa100", "strategy=zero3_offload"])
    zero = cfg.trainer.strategy.config.zero_optimization
    assert zero.stage == 3
    assert zero.offload_optimizer.device == "cpu"
    assert "offload_param" not in zero


@pytest.mark.parametrize(
    ("strategy", "precision", "dtype"),
    [
        ("zero2", "bf16-mixed", "bfloat16"),
        ("zero3", "16-mixed", "float16"),
        ("zero3", "32-true", "float32"),
        ("ddp", "bf16-mixed", "float32"),
    ],
)
def test_weights_dtype(strategy: str, precision: str, dtype: str):
    assert resolvers.weights_dtype(strategy, precision) == dtype


@pytest.mark.parametrize(
    ("trainer", "dtype"),
    [
        ("trainer=8xv100", "float16"),
        ("trainer=8xa100", "bfloat16"),
        ("trainer=8xa100 trainer.precision=16-mixed", "float16"),
        ("trainer=cpu", "float32"),
    ],
)
def test_weights_in_4_bits_are_computed_with_in_the_trainers_precision(trainer: str, dtype: str):
    cfg = compose_job([*trainer.split(), "stage=finetune", "model=7b", "tuning=qlora"])
    settings = instantiate(cfg.module.quantization)
    assert settings.compute_dtype == dtype
    found: Any = quantization_config(settings)
    assert str(found.bnb_4bit_compute_dtype) == f"torch.{dtype}"
    # What is not in few bits: adapters and projector are float32, the rest is held in halves.
    assert cfg.machine.weights_dtype == "float32"


@pytest.mark.parametrize(
    ("here", "job", "chosen"),
    [
        ("laptop", "", "sdpa"),
        ("laptop", "trainer=8xa100", "sdpa"),  # nothing is installed on this laptop
        ("8xa100", "", "flash_attention_2"),
        ("8xa100", "trainer=1gpu", "flash_attention_2"),
        ("8xa100", "trainer=cpu", "sdpa"),
        ("8xa100", "trainer.accelerator=cpu", "sdpa"),
        ("8xa100", "trainer.precision=32-true", "sdpa"),
        ("8xa100", "trainer=8xv100", "sdpa"),  # planned for another machine
        ("8xa100", "trainer=8xa100 machine.capability=9.0", "flash_attention_3"),
        ("8xa100", "machine.attn_implementation=eager", "eager"),
        ("8xv100", "trainer=8xa100", "flash_attention_2"),
        ("2xt4", "", "sdpa"),
    ],
    indirect=["here"],
)
def test_attention_follows_devices_precision_and_what_is_installed(job: str, chosen: str):
    assert _resolve("model=7b", *job.split(), keys=("model.spec.attn_implementation",)) == [chosen]


def test_names_make_the_folders():
    keys = ("run_dir", "callbacks.checkpoint.dirpath", "logger.csv.folder", "stage.checkpoint")
    job = ("stage=gpt4v", "experiment=quickstart")
    assert _resolve(*job, keys=keys) == [
        "runs/quickstart/tiny-gpt4v",
        "runs/quickstart/tiny-gpt4v/checkpoints",
        "runs/quickstart/tiny-gpt4v/csv",
        "runs/quickstart/tiny-finetune/export",
    ]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/7b-gpt4v/export", "7b-gpt4v"),
        ("runs/7b-gpt4v/checkpoints/000500.ckpt", "7b-gpt4v-000500"),
        ("runs/my-lora/adapter", "my-lora-adapter"),
        ("llava-hf/vip-llava-7b-hf", "vip-llava-7b-hf"),
        ("models/merged/", "merged"),
    ],
)
def test_a_checkpoint_is_called_by_its_run(checkpoint: str, name: str):
    assert resolvers.checkpoint_name(checkpoint) == name


def test_quiet_has_no_progress_bar():
    cfg = compose_job(["callbacks=quiet"])
    assert cfg.callbacks.progress is None
    assert cfg.trainer.enable_progress_bar is False
