"""Which part of the network trains, and the table that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.adapters import adapter_parameters, has_adapters
from vipllava.models.image_features import read_parameters
from vipllava.types import ConfigError

PARTS = ("vision_tower", "projector", "language_model")
"""The parts that a stage may train; ``language_model`` includes embeddings and head."""


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One line of the parameter table.

    Attributes:
        part: name of the part.
        num_parameters: weights in it; a tied weight counts once.
        num_trainable: those of them that get a gradient.
    """

    part: str
    num_parameters: int
    num_trainable: int


def modules_of(model: VipLlavaForConditionalGeneration) -> Mapping[str, tuple[nn.Module, ...]]:
    """Return the modules of each part, in the order of :data:`PARTS`."""
    return {
        "vision_tower": (model.model.vision_tower,),
        "projector": (model.model.multi_modal_projector,),
        "language_model": (model.model.language_model, model.lm_head),
    }


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts as a tuple.

    Raises:
        ConfigError: a name is unknown or given twice, or there is none.
    """
    parts = tuple(parts)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or len(set(parts)) != len(parts) or not parts:
        raise ConfigError(
            f"trainable={list(parts)} must name at least one part, each once, of {', '.join(PARTS)}"
        )
    return parts


def set_trainable(model: VipLlavaForConditionalGeneration, parts: Sequence[str]) -> None:
    """Give gradients to the parameters of ``parts`` and to no others.

    Of a language model with adapters these alone train. What is never read of the vision tower
    stays frozen: DDP would wait for its gradients, and decay would shrink it.

    Raises:
        ConfigError: see :func:`check_parts`.
    """
    parts = check_parts(parts)
    for part, modules in modules_of(model).items():
        for module in modules:
            adapters = adapter_parameters(module)
            for parameter in module.parameters():
                # Weights in few bits are whole numbers and cannot have a gradient.
                parameter.requires_grad_(part in parts and not adapters)
            for parameter in adapters.values():
                parameter.requires_grad_(part in parts)
        if part == "language_model" and has_adapters(model):
            model.lm_head.requires_grad_(False)
    read = set(map(id, read_parameters(model)))
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in read)


def hold_frozen(model: VipLlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Hold what does not train in the dtype that is computed in.

    Only what trains needs float32 master weights. The rest would be cast to ``dtype`` in every
    product, which takes twice the memory and the time of the cast. A weight held in few bits stays.

    Args:
        model: the network, trainable parameters chosen.
        dtype: bfloat16 or float16, as the trainer's precision says.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, of which this process may hold a part.

    ZeRO-3 leaves an empty tensor in its place; a part under FSDP2 has the shape of the whole.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def num_elements(parameter: nn.Parameter) -> int:
    """Return the number of values of a parameter, of which this process may hold a part."""
    return math.prod(whole_shape(parameter))


def parameter_table(model: VipLlavaForConditionalGeneration) -> tuple[ParameterRow, ...]:
    """Count the parameters of each part."""
    rows: list[ParameterRow] = []
    for part, modules in modules_of(model).items():
        # Keyed by identity: a head tied to the embeddings is one weight.
        parameters = {id(p): p for module in modules for p in module.parameters()}
        total = sum(map(num_elements, parameters.values()))
        trainable = sum(num_elements(p) for p in parameters.values() if p.requires_grad)
        rows.append(ParameterRow(part, total, trainable))
    return tuple(rows)
