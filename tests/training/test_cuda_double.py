"""What a run on CUDA devices would do, see :mod:`tests.training.cuda_double`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from tests.training.cuda_double import PACKAGES, cuda_double, machine
from tests.training.gpu_cases import Case, near, train
from tests.training.toy_training import LIGHTNING_WARNINGS
from vipllava.config import hardware
from vipllava.config.checks import check_config
from vipllava.config.composing import compose_job
from vipllava.models.building import ModelSpec
from vipllava.models.placing import OnDevice
from vipllava.training.job import partial
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.run import _plugins
from vipllava.training.sharding import HandedOut, placement_for
from vipllava.types import ConfigError

pytestmark = LIGHTNING_WARNINGS

MACHINES = {
    "1gpu": ("H200", 1),
    "8xa100": ("A100", 8),
    "8xa100_40g": ("A100-40G", 8),
    "8xa6000": ("A6000", 8),
    "8xh100": ("H100", 8),
    "8xh200": ("H200", 8),
    "8xrtx3090": ("RTX3090", 8),
    "8xv100": ("V100", 8),
    "auto": ("A100", 8),
    "multinode": ("A100", 8),
}
"""By trainer: the devices of a node."""
SHARED = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
TUNINGS = ("full", "lora", "qlora")
CLIP = 0.5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_no_double_stays_in_its_process():
    detect = hardware.detect  # a name of its own, which is not replaced
    here = detect()
    detect.cache_clear()
    with cuda_double(machine("A6000", 8)):
        assert len(hardware.detect().cuda) == 8
        assert detect() == here
    assert hardware.detect() == here


def _compose(trainer: str, strategy: str, tuning: str, *more: str) -> DictConfig:
    chosen = [] if strategy == "auto" else [f"strategy={strategy}"]
    return compose_job(
        [
            *("model=7b", "stage=finetune", "stage.checkpoint=null", f"trainer={trainer}"),
            *(*chosen, f"tuning={tuning}", "data.manifest=sample_finetune", "callbacks=quiet"),
            # Asking for more would make the loader.
            *("trainer.max_epochs=-1", "trainer.max_steps=10", f"stage.gradient_clip={CLIP}"),
            *more,
        ]
    )


def _trainer(cfg: DictConfig) -> lightning.Trainer:
    return partial(cfg.trainer)(logger=False, callbacks=[], plugins=_plugins(cfg))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has started this process; two nodes are two because a variable says so."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads know nothing of the double
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("8xa100", "8xv100") else pytest.param(name, marks=pytest.mark.slow)
        for name in MACHINES
    ],
)
def test_every_trainer_strategy_and_tuning(name, alone, monkeypatch):
    """Who scales, who clips, which AdamW, which attention; or the combination is refused."""
    if name == "multinode":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        for variable, value in {"LOCAL_WORLD_SIZE": 8, "WORLD_SIZE": 16, "RANK": 0}.items():
            monkeypatch.setenv(variable, str(value))
        for variable, value in {"LOCAL_RANK": 0, "GROUP_RANK": 0}.items():
            monkeypatch.setenv(variable, str(value))
    device, count = MACHINES[name]
    half = FP16 if device == "V100" else BF16
    installed = PACKAGES | {"flash_attn"}
    refused = set()
    with cuda_double(machine(device, count, installed)):
        for strategy in ("auto",) if name == "1gpu" else ("auto", *SHARED):
            for tuning in TUNINGS:
                cfg = _compose(name, strategy, tuning)
                try:
                    check_config(cfg)
                except ConfigError:
                    refused.add((strategy, tuning))
                    continue
                _check_decisions(cfg, half)
                attention = "sdpa" if half is FP16 else "flash_attention_2"
                assert cfg.machine.attn_implementation == attention
    whole_only = {(s, "qlora") for s in ("fsdp2", "zero3", "zero3_offload")}
    no_scaling = {("fsdp2", tuning) for tuning in TUNINGS}
    wanted = set() if name == "1gpu" else whole_only | (no_scaling if half is FP16 else set())
    assert refused == wanted


def _check_decisions(cfg: DictConfig, half: torch.dtype) -> None:
    trainer = _trainer(cfg)
    strategy: Any = trainer.strategy
    where = (cfg.machine.name, cfg.strategy.name, cfg.tuning.name)
    plugin: Any = trainer.precision_plugin
    if cfg.strategy.name.startswith("zero"):
        assert type(plugin).__name__ == "DeepSpeedPrecision", where
        assert strategy.config["gradient_clipping"] == CLIP, where
        assert cfg.machine.weights_dtype == str(half).removeprefix("torch."), where
    else:
        assert type(plugin).__name__ == "MixedPrecision", where
        assert (plugin.scaler is not None) == (half is FP16), where
        assert cfg.machine.weights_dtype == "float32", where
    if cfg.tuning.quantization:
        found = OmegaConf.to_container(cfg.tuning.quantization, resolve=True)
        assert found["compute_dtype"] == str(half).removeprefix("torch."), where
    assert trainer.gradient_clip_val == CLIP, where


NETWORKS = [
    # strategy, precision, stage, tuning: held in what trains, in what does not; fused; who clips.
    ("auto", "bf16-mixed", "pretrain", "full", FP32, BF16, True, True),
    ("auto", "bf16-mixed", "finetune", "full", FP32, BF16, True, True),
    ("auto", "bf16-mixed", "finetune", "lora", FP32, BF16, True, True),
    ("auto", "bf16-mixed", "finetune", "qlora", FP32, BF16, True, True),
    ("auto", "32-true", "finetune", "full", FP32, FP32, True, True),
    ("auto", "16-mixed", "pretrain", "full", FP32, FP16, False, True),
    ("auto", "16-mixed", "finetune", "full", FP32, FP16, False, True),
    ("auto", "16-mixed", "finetune", "qlora", FP32, FP16, False, True),
    ("ddp", "bf16-mixed", "finetune", "full", FP32, BF16, True, True),
    ("ddp", "bf16-mixed", "finetune", "qlora", FP32, BF16, True, True),
    ("ddp", "16-mixed", "finetune", "lora", FP32, FP16, False, True),
    ("zero2", "bf16-mixed", "pretrain", "full", BF16, BF16, True, False),
    ("zero2", "bf16-mixed", "finetune", "full", BF16, BF16, True, False),
    ("zero2", "bf16-mixed", "finetune", "lora", BF16, BF16, True, False),
    ("zero2", "16-mixed", "finetune", "full", FP16, FP16, False, False),
]


@pytest.mark.parametrize(
    ("strategy", "precision", "stage", "tuning", "trains", "frozen", "fused", "clips"), NETWORKS
)
def test_dtypes_optimizer_and_clipping(
    strategy, precision, stage, tuning, trains, frozen, fused, clips, tiny_sources, alone
):
    count = 1 if strategy == "auto" else 8
    with cuda_double(machine("V100" if precision == "16-mixed" else "A100", count)) as seen:
        name = "1gpu" if strategy == "auto" else "auto"
        cfg = _compose(name, strategy, tuning, f"stage={stage}", f"trainer.precision={precision}")
        trainer, module = _trainer(cfg), _module(cfg, tiny_sources)
        strategy_ = trainer.strategy
        module.trainer = trainer
        strategy_.connect(module)
        module.configure_model()
        # Each weight went to the device once, as its file has it.
        network = module.network
        moved = seen.moved
        assert moved > 0
        module.to(strategy_.root_device)
        optimizer = module.configure_optimizers()["optimizer"]

        few_bits = {torch.uint8, torch.int8} if tuning == "qlora" else set()
        held = {p.dtype for p in network.parameters() if not p.requires_grad}
        assert held == {frozen, *(few_bits & {torch.uint8})}
        assert {p.dtype for p in network.parameters() if p.requires_grad} == {trains}
        assert {b.dtype for n, b in network.named_buffers() if n.endswith("inv_freq")} == {FP32}
        assert all(bool(group.get("fused")) == fused for group in optimizer.param_groups)

        parameters = [p for p in network.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        before = _norm(parameters)
        if clips:  # DeepSpeed looks at the gradients when it has them in parts
            module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer, CLIP, "norm")
        assert _norm(parameters) == pytest.approx(CLIP if clips else before, rel=1e-3)


def _module(cfg: DictConfig, sources: Any) -> VipLlavaLitModule:
    spec = ModelSpec(
        vision_tower=sources.vision_tower,
        language_model=sources.rows_of_64,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
        dtype=cfg.machine.weights_dtype,
    )
    return partial(cfg.module)(seed=1, model=spec, gradient_checkpointing=True)


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    return float(torch.stack([p.grad.float().norm() for p in parameters]).norm())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "zero3_offload"])
def test_which_process_reads_and_where_to(strategy, rank, alone, monkeypatch):
    """One's own device everywhere; under ZeRO-3 the first process reads, the others are handed."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning's strategies set it for all
    with cuda_double(machine("A100", 8)):
        trainer = _trainer(_compose("8xa100", strategy, "full"))
        trainer.strategy.cluster_environment.set_global_rank(rank)
        placement = placement_for(trainer.strategy)
    assert placement.device == torch.device("cuda", rank)
    handed_out = strategy.startswith("zero3")
    assert isinstance(placement, HandedOut if handed_out else OnDevice)
    assert placement.reads == (rank == 0 or not handed_out)


QUICK = [
    Case(),
    Case(packed=True),
    Case(stage="pretrain"),
    Case(tuning="lora"),
    Case(tuning="qlora"),
    Case(precision="16-mixed", tuning="qlora"),
    Case("ddp"),
]
MORE = [
    Case(precision="16-mixed"),
    Case(precision="16-mixed", tuning="lora"),
    Case(precision="32-true"),
    Case("ddp", tuning="qlora"),
    Case(tuning="lora", packed=True),
]


@pytest.fixture(scope="module")
def reference() -> dict[Case, list[float]]:
    """Losses on the CPU in float32, by case."""
    return {}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_a_run_on_one_device_trains_as_one_on_the_cpu(case, config, tiny_sources, alone, reference):
    with cuda_double(machine("V100" if case.precision == "16-mixed" else "A100", 1)) as seen:
        found = train(case, config, tiny_sources)
    on_cpu = replace(case, strategy="single", precision="32-true")
    if on_cpu not in reference:
        reference[on_cpu] = train(on_cpu, config, tiny_sources, "cpu")
    assert found == near(reference[on_cpu], case)
    # Every batch was pinned and copied, and no copy was waited for.
    assert seen.copied == seen.pinned > 0
    assert seen.waited == 0


def test_a_run_that_stops_goes_on(config, tiny_sources, alone, tmp_path: Path):
    with cuda_double(machine("A100", 1)):
        whole = train(Case(), config, tiny_sources)
        stopped = train(Case(), config, tiny_sources, stops=True)
    assert stopped == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_a_process_of_its_own_trains_alike(config, tiny_sources):
    """As ``pytest -m gpu`` does with DeepSpeed."""
    whole = train(Case(), config, tiny_sources, "cpu")
    found = train(Case(tuning="full"), config, tiny_sources, "cpu", stops=True, in_child=True)
    assert found == pytest.approx(whole, rel=1e-6)
