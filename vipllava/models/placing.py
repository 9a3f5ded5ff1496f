"""A network read weight by weight, each straight to where it is going to be.

The network is first made hollow: its weights have names, shapes and dtypes and no memory. What
trains and what each weight is held in is decided on that; then one after the other is read, put in
its place and cast there, so that no more than one is ever in two places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from vipllava.models.tensor_files import LazyTensor, read_tensor, shape_of


class Placement(Protocol):
    """Where this process's weights go, one after the other as they are read."""

    device: torch.device  # of this process
    reads: bool  # the files, or is handed its part of what another one reads

    def put(self, hollow: nn.Parameter, read: Callable[[], torch.Tensor]) -> nn.Parameter:
        """Make what takes a hollow parameter's place; ``read`` reads the whole weight."""
        ...


@dataclass
class OnDevice:
    """Every process reads every weight to its own device.

    On the host is the file alone, mapped into memory that all processes of a machine share.
    """

    device: torch.device
    reads: bool = True

    def put(self, hollow: nn.Parameter, read: Callable[[], torch.Tensor]) -> nn.Parameter:
        """Read, move, then cast."""
        value = read().to(self.device).to(hollow.dtype)
        return nn.Parameter(value, requires_grad=hollow.requires_grad)


def hollow_network(
    make: Any, config: VipLlavaConfig, dtype: torch.dtype, attn_implementation: Any
) -> VipLlavaForConditionalGeneration:
    """Make a network of class ``make``: parameters on the meta device, buffers computed."""
    register = nn.Module.register_parameter

    def register_hollow(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_hollow
    try:
        # Buffers follow from the config; computed on the CPU whatever the caller's default is.
        with torch.device("cpu"):
            model = make._from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attn_implementation
            )
    finally:
        nn.Module.register_parameter = register
    return model.eval()


def _weight_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the first name of each weight, all its names (a tied head has two)."""
    first: dict[int, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = first.setdefault(id(parameter), name)
        names[key] = (*names.get(key, ()), name)
    return names


def one_to_one(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    stored_name: Callable[[str], str | None],
) -> Callable[[str], torch.Tensor] | None:
    """Match a hollow network's weights with the tensors, by their stored names, for them.

    Returns what reads a weight by its first name; None if any is without its match, or misshapen.
    """
    found: dict[str, LazyTensor] = {}
    every = _weight_names(model)
    for first, names in every.items():
        stored = [key for key in map(stored_name, names) if key is not None and key in tensors]
        if len(stored) != 1:
            return None
        found[first] = tensors[stored[0]]
        if shape_of(found[first]) != tuple(model.get_parameter(first).shape):
            return None
    num_names = sum(map(len, every.values()))
    if len(found) != len(tensors) or num_names != len(model.state_dict()):
        return None
    return lambda name: read_tensor(found[name])


def fill(model: nn.Module, read: Callable[[str], torch.Tensor], placement: Placement) -> None:
    """Replace every parameter by what is read for it, and move the buffers, in place.

    The model is hollow, or whole on the host; ``read`` takes a weight's first name in it.
    """

    def put(name: str, value: torch.Tensor) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, value)

    for first, names in _weight_names(model).items():
        parameter = placement.put(model.get_parameter(first), partial(read, first))
        for name in names:
            put(name, parameter)
    for name, buffer in list(model.named_buffers()):
        put(name, buffer.to(placement.device))
