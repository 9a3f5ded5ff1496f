from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vipllava.training.optim import (
    OptimizerSettings,
    backward_scale,
    build_optimizer,
    build_schedule,
    gradient_norm,
    learning_rates,
    parameter_groups,
    uses_fused_adamw,
)
from vipllava.types import ConfigError


def _network() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "projector": nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3)),
            "language_model": nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5)),
        }
    )


def _parts(network: nn.ModuleDict) -> dict[str, tuple[nn.Module, ...]]:
    return {name: (module,) for name, module in network.items()}


def test_groups_by_rate_and_decay():
    network = _network()
    network["language_model"][2].weight.requires_grad_(False)
    settings = OptimizerSettings(learning_rate=2e-5, projector_learning_rate=1e-3, weight_decay=0.1)

    groups = parameter_groups(_parts(network), settings)

    found = {
        g["name"]: (g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]])
        for g in groups
    }
    assert found == {
        "projector": (1e-3, 0.1, [(3, 2)]),
        "projector_no_decay": (1e-3, 0.0, [(2,), (2,), (3,)]),
        "language_model": (2e-5, 0.1, [(5, 3)]),
        "language_model_no_decay": (2e-5, 0.0, [(3,), (3,), (5,)]),
    }


def test_nothing_trains():
    network = _network().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter trains"):
        parameter_groups(_parts(network), OptimizerSettings(1e-3))


def _rates(settings: OptimizerSettings, num_steps: int) -> list[float]:
    network = _network()
    groups = parameter_groups(_parts(network), settings)
    optimizer = build_optimizer(groups, settings)
    schedule = build_schedule(optimizer, settings, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_after_warm_up_rounded_up():
    # 3 % of 40 steps: 1.2, so 2 steps of warm-up.
    rates = _rates(OptimizerSettings(1.0), 40)

    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[21] == pytest.approx(0.5)  # half way of the 38 steps that follow
    assert 0 < rates[-1] < 0.01
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_constant_without_warm_up():
    assert _rates(OptimizerSettings(1.0, warmup_ratio=0.0, schedule="constant"), 3) == [1.0] * 3


def test_every_impossible_value_is_named():
    with pytest.raises(ConfigError) as error:
        OptimizerSettings(
            learning_rate=0.0,
            projector_learning_rate=-1.0,
            weight_decay=-0.1,
            betas=(0.9, 1.0),
            warmup_ratio=1.5,
            schedule="linear",
        )
    for part in (
        "learning_rate=0.0",
        "projector_learning_rate=-1.0",
        "weight_decay=-0.1",
        "betas=[0.9, 1.0]",
        "warmup_ratio=1.5",
        "schedule='linear' is unknown: use one of cosine, constant",
    ):
        assert part in str(error.value)


def test_gradient_norm():
    weights = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.ones(1)),
    ]
    assert gradient_norm(weights).item() == 0.0
    weights[0].grad, weights[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert gradient_norm(weights).item() == 7.0


def test_every_part_may_have_a_rate_of_its_own():
    network = nn.ModuleDict(
        {
            part: nn.Linear(2, 2, bias=False)
            for part in ("vision_tower", "projector", "language_model")
        }
    )
    settings = OptimizerSettings(
        2e-5, projector_learning_rate=1e-4, vision_tower_learning_rate=2e-6
    )
    rates = {g["name"]: g["lr"] for g in parameter_groups(_parts(network), settings)}

    assert rates == {"vision_tower": 2e-6, "projector": 1e-4, "language_model": 2e-5}
    with pytest.raises(ConfigError, match="vision_tower_learning_rate=0 must be positive"):
        OptimizerSettings(2e-5, vision_tower_learning_rate=0)


def test_rates_of_parts_are_told_apart_where_they_differ():
    parts = {"projector": [nn.Linear(2, 2)], "language_model": [nn.Linear(2, 2)]}

    def rates(settings: OptimizerSettings, steps: int = 0) -> dict[str, float]:
        optimizer = build_optimizer(parameter_groups(parts, settings), settings)
        schedule = build_schedule(optimizer, settings, num_steps=8)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return learning_rates(optimizer.param_groups)

    assert rates(OptimizerSettings(2e-4, warmup_ratio=0)) == {"train/lr": 2e-4}
    lora = OptimizerSettings(2e-4, projector_learning_rate=2e-5, warmup_ratio=0.5)
    zero = {"train/lr": 0.0, "train/lr/projector": 0.0, "train/lr/language_model": 0.0}
    assert rates(lora) == zero  # they differ later, and a log has one set of columns
    assert rates(lora, 2) == pytest.approx(
        {"train/lr": 1e-4, "train/lr/projector": 1e-5, "train/lr/language_model": 1e-4}
    )


@pytest.mark.parametrize(
    ("world_size", "accumulate", "is_deepspeed", "scale"),
    [(1, 1, False, 1.0), (2, 1, False, 2.0), (2, 4, False, 8.0), (2, 4, True, 32.0)],
)
def test_backward_scale(world_size, accumulate, is_deepspeed, scale):
    assert backward_scale(world_size, accumulate, is_deepspeed=is_deepspeed) == scale


@pytest.mark.parametrize(
    ("device_type", "precision", "fused"),
    [
        ("cuda", "bf16-mixed", True),
        ("cuda", "32-true", True),
        ("cuda", "16-mixed", False),
        ("cpu", "bf16-mixed", False),
        ("mps", "32-true", False),
    ],
)
def test_which_runs_have_a_fused_step(device_type, precision, fused):
    assert uses_fused_adamw(device_type, precision) is fused


def test_a_checkpoint_brings_moments_and_no_settings():
    network = _network()

    def begin(settings: OptimizerSettings, *, fused: bool = False):
        groups = parameter_groups(_parts(network), settings)
        optimizer = build_optimizer(groups, settings, fused=fused)
        return optimizer, build_schedule(optimizer, settings, num_steps=10)

    first = OptimizerSettings(1e-3, projector_learning_rate=1e-2, warmup_ratio=0, schedule="cosine")
    optimizer, schedule = begin(first)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))

    changes = {"weight_decay": 0.5, "betas": (0.8, 0.9), "eps": 1e-6}
    second = OptimizerSettings(2e-3, projector_learning_rate=1e-5, warmup_ratio=0, **changes)
    optimizer, schedule = begin(second, fused=True)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    settings = {
        g["name"]: (g["lr"], g["initial_lr"], g["weight_decay"], g["betas"], g["eps"], g["fused"])
        for g in optimizer.param_groups
    }
    rest = ((0.8, 0.9), 1e-6, True)
    # Half of the run is done, and the cosine is at a half.
    assert settings == {
        "projector": (pytest.approx(5e-6), 1e-5, 0.5, *rest),
        "projector_no_decay": (pytest.approx(5e-6), 1e-5, 0.0, *rest),
        "language_model": (pytest.approx(1e-3), 2e-3, 0.5, *rest),
        "language_model_no_decay": (pytest.approx(1e-3), 2e-3, 0.0, *rest),
    }
    moments = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert (float(moments["step"]), moments["exp_avg"].unique().numel()) == (5.0, 1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[2]["lr"] < 1e-3
    # The same settings go on to the last bit.
    optimizer, schedule = begin(first)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in saved[0]["param_groups"]]


def test_a_checkpoint_of_other_groups_is_refused():
    settings = OptimizerSettings(1e-3)
    parts = _parts(_network())
    optimizer = build_optimizer(parameter_groups(parts, settings), settings)
    other = build_optimizer(parameter_groups({"projector": parts["projector"]}, settings), settings)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(optimizer.state_dict())
