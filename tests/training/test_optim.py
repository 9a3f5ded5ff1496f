from __future__ import annotations

import pytest
import torch
from torch import nn

from vipllava.training.optim import (
    OptimizerSettings,
    build_optimizer,
    build_schedule,
    gradient_norm,
    learning_rates,
    parameter_groups,
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
