"""Optimizer, gradients and schedule of the recipe: AdamW, warm-up, then a cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vipllava.models.freezing import whole_shape
from vipllava.types import ConfigError

_NO_DECAY: Final = "_no_decay"
_SCHEDULES: dict[str, Callable[[float], float]] = {  # of the share done behind the warm-up
    "cosine": lambda done: max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))),
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The numbers of the optimizer."""

    learning_rate: float  # peak learning rate
    projector_learning_rate: float | None = None  # that of the projector, or None for the same
    vision_tower_learning_rate: float | None = None  # that of the tower where it trains, likewise
    weight_decay: float = 0.0  # decoupled weight decay; norms and biases are never decayed
    betas: Sequence[float] = (0.9, 0.999)  # decay rates of Adam's two moments
    eps: float = 1e-8  # Adam's epsilon
    warmup_ratio: float = 0.03  # share of the steps over which the rate rises linearly from 0
    schedule: str = "cosine"  # ``cosine`` (to zero) or ``constant``, both after the warm-up

    def __post_init__(self) -> None:
        rates = ("learning_rate", "projector_learning_rate", "vision_tower_learning_rate")
        problems = [
            f"{name}={value} must be positive"
            for name in rates
            if (value := getattr(self, name)) is not None
            and not (math.isfinite(value) and value > 0)
        ]
        if self.weight_decay < 0:
            problems.append(f"weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"warmup_ratio={self.warmup_ratio} must lie in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            problems.append(f"betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.schedule not in _SCHEDULES:
            known = ", ".join(_SCHEDULES)
            problems.append(f"schedule={self.schedule!r} is unknown: use one of {known}")
        if problems:
            raise ConfigError("the optimizer's settings are impossible: " + "; ".join(problems))


def parameter_groups(
    parts: Mapping[str, Iterable[nn.Module]], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups of one rate and one weight decay.

    Of the modules of each part, see :func:`vipllava.models.freezing.modules_of`; tied parameters
    come once. Raises ConfigError if nothing trains.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``; none is empty.
    """
    rates = {
        "projector": settings.projector_learning_rate,
        "vision_tower": settings.vision_tower_learning_rate,
    }
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for part, modules in parts.items():
        rate = rates.get(part) or settings.learning_rate
        matrices, vectors = (
            {"name": name, "params": list[nn.Parameter](), "lr": rate, "weight_decay": decay}
            for name, decay in ((part, settings.weight_decay), (f"{part}{_NO_DECAY}", 0.0))
        )
        for parameter in (p for module in modules for p in module.parameters()):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (matrices if len(whole_shape(parameter)) >= 2 else vectors)["params"] += [parameter]
        groups += [group for group in (matrices, vectors) if group["params"]]
    if not groups:
        raise ConfigError("no parameter trains: name at least one part by trainable=[PART]")
    return groups


def learning_rates(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the highest rate as ``train/lr``, and ``train/lr/PART`` where peak rates differ."""
    rates: dict[str, float] = {}
    peaks: set[float] = set()
    for group in groups:
        rates[f"train/lr/{str(group['name']).removesuffix(_NO_DECAY)}"] = float(group["lr"])
        peaks.add(float(group["initial_lr"]))
    return {"train/lr": max(rates.values()), **(rates if len(peaks) > 1 else {})}


def uses_fused_adamw(device_type: str, precision: str) -> bool:
    """Whether a run's AdamW is one kernel for the whole step, without temporary copies.

    Not with a loss scale: a fused step would divide by it, behind the clipping.
    """
    return device_type == "cuda" and precision != "16-mixed"


def build_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, *, fused: bool = False
) -> AdamW:
    """Make AdamW; of a checkpoint it loads the moments, not rates, betas, epsilon and decay."""
    betas: Any = tuple(settings.betas)
    optimizer = AdamW(groups, settings.learning_rate, betas, settings.eps, fused=fused or None)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) != len(saved):
        return None  # which PyTorch refuses
    settings = [{k: v for k, v in group.items() if k != "params"} for group in own]
    return state | {"param_groups": [a | b for a, b in zip(saved, settings, strict=True)]}


def build_schedule(
    optimizer: Optimizer,
    settings: OptimizerSettings,
    num_steps: int,
    steps_done: Callable[[int], float] = float,
) -> LambdaLR:
    """Make the schedule of a run of ``num_steps`` optimizer steps, warm-up rounded up.

    The rate of step k of a warm-up is k / warm-up steps, 0 in the first, as in the released
    training. ``steps_done`` says how much of the run is done, in steps, where it is not the count.
    """
    num_warmup = math.ceil(settings.warmup_ratio * num_steps)
    shape = _SCHEDULES[settings.schedule]

    def scale(step: int) -> float:
        done = steps_done(step)
        if done < num_warmup:
            return done / num_warmup
        return shape((done - num_warmup) / max(1, num_steps - num_warmup))

    return _Schedule(optimizer, scale)


class _Schedule(LambdaLR):
    """Goes on at the step of a checkpoint with the peak rates and the shape of this run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        peaks = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = peaks
        scales = [scale(self.last_epoch) for scale in self.lr_lambdas]
        self._last_lr = [peak * scale for peak, scale in zip(peaks, scales, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def backward_scale(world_size: int, accumulate: int, *, is_deepspeed: bool = False) -> float:
    """Return what a micro-batch's loss is multiplied with to undo what the framework divides by.

    The loss is divided by the global batch's supervised tokens already. All strategies average
    over the ``world_size`` ranks, and Lightning divides by the ``accumulate`` micro-batches.
    DeepSpeed's ``backward`` does so once more: Adam hides it, clipping does not.
    """
    return float(world_size * accumulate * (accumulate if is_deepspeed else 1))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the 2-norm over all gradients together, float32; 0 where there is none."""
    norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # A sharded gradient (FSDP2) has a norm that still is to be summed over its shards.
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
