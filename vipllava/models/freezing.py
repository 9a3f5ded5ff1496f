"""Which part of the network trains, and the table that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.adapters import adapter_parameters
from vipllava.models.towers import read_parameters
from vipllava.types import ConfigError

PARTS = ("vision_tower", "projector", "language_model")
"""The parts that a stage may train; ``language_model`` includes embeddings and head."""


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One line of the parameter table."""

    part: str  # its name, of :data:`PARTS`
    num_parameters: int  # weights in it; a tied weight counts once
    num_trainable: int  # those of them that get a gradient


def modules_of(model: VipLlavaForConditionalGeneration) -> Mapping[str, tuple[nn.Module, ...]]:
    """Return the modules of each part, in the order of :data:`PARTS`."""
    return {
        "vision_tower": (model.model.vision_tower,),
        "projector": (model.model.multi_modal_projector,),
        "language_model": (model.model.language_model, model.lm_head),
    }


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts; a ConfigError where a name is unknown or given twice, or there is none."""
    parts = tuple(parts)
    if not parts or len(set(parts) & set(PARTS)) != len(parts):
        raise ConfigError(
            f"trainable={list(parts)} must name at least one part, each once, of {', '.join(PARTS)}"
        )
    return parts


def set_trainable(model: VipLlavaForConditionalGeneration, parts: Sequence[str]) -> None:
    """Give gradients to the parameters of ``parts`` and to no others.

    Of a language model with adapters these alone train. What is never read of the vision tower
    stays frozen: DDP would wait for its gradients, and decay would shrink it.
    """
    parts = check_parts(parts)
    adapters = adapter_parameters(model).values()
    can_train = {"vision_tower": set(map(id, read_parameters(model)))}
    if adapters:
        can_train["language_model"] = set(map(id, adapters))
    for part, modules in modules_of(model).items():
        able = can_train.get(part)
        for parameter in (p for module in modules for p in module.parameters()):
            trains = part in parts and (able is None or id(parameter) in able)
            parameter.requires_grad_(trains)


def hold_frozen(model: VipLlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Hold what does not train in the half precision that is computed in, master weights aside.

    Else it is cast to ``dtype`` in every product, which takes twice the memory and the time of the
    cast. A weight held in few bits stays.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, of which this process may hold a part."""
    # ZeRO-3 leaves an empty tensor in its place; a part under FSDP2 has the shape of the whole.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_table(model: VipLlavaForConditionalGeneration) -> tuple[ParameterRow, ...]:
    """Count the parameters of each part."""
    rows: list[ParameterRow] = []
    for part, modules in modules_of(model).items():
        # Keyed by identity: a head tied to the embeddings is one weight.
        parameters = {id(p): p for module in modules for p in module.parameters()}
        counts = [(math.prod(whole_shape(p)), p.requires_grad) for p in parameters.values()]
        trainable = sum(count for count, trains in counts if trains)
        rows.append(ParameterRow(part, sum(count for count, _ in counts), trainable))
    return tuple(rows)
