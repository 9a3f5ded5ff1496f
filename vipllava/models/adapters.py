"""LoRA on the language model: where adapters go, and how they become weights again.

The targets are every linear layer of the decoder blocks, found by its type, and nothing of the
tower, whose layers have the same names. peft does the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.types import ConfigError

BLOCKS: Final = "model.language_model.layers"
"""Where the decoder blocks lie in the network."""

_FACTOR: Final = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """The numbers of LoRA."""

    r: int = 128  # rank
    alpha: float = 256  # the update is scaled by ``alpha / r``
    dropout: float = 0.05  # of an adapter's input, in training
    bias: str = "none"  # the published recipe trains no bias

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError that lists all problems."""
        problems: list[str] = []
        if self.r < 1:
            problems.append(f"r={self.r} must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout} must lie in [0, 1)")
        if self.bias != "none":
            problems.append(f"bias={self.bias!r} is not supported; use none")
        if problems:
            raise ConfigError("the adapter's settings are impossible: " + "; ".join(problems))


def adapter_targets(model: VipLlavaForConditionalGeneration) -> tuple[str, ...]:
    """Return the names, in the network, of all linear layers of the decoder blocks."""
    return tuple(
        # What is adapted has its layer and the factors inside it.
        f"{BLOCKS}.{name.removesuffix('.base_layer')}"
        for name, module in model.get_submodule(BLOCKS).named_modules()
        if isinstance(module, nn.Linear) and not _FACTOR.search(name)
    )


def target_pattern(model: VipLlavaForConditionalGeneration) -> str:
    """Return a regular expression that matches :func:`adapter_targets` and nothing else.

    Anchored to the decoder blocks: a bare ``q_proj`` would match the tower's, too.

    Raises:
        ConfigError: the blocks have linear layers of differing names.
    """
    targets = adapter_targets(model)
    kinds = sorted({name.removeprefix(f"{BLOCKS}.").split(".", 1)[1] for name in targets})
    pattern = rf"{re.escape(BLOCKS)}\.\d+\.(?:{'|'.join(map(re.escape, kinds))})"
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    if matched != set(targets):
        raise ConfigError(
            f"the decoder blocks differ: {sorted(matched ^ set(targets))[:5]} are linear layers in "
            "some blocks only; this language model cannot be adapted"
        )
    return pattern


def lora_config(settings: AdapterSettings, **options: Any) -> Any:
    """Return peft's config, further ``options`` in it; a ConfigError where peft is missing."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            'LoRA needs peft, which is not installed: pip install "vipllava-lightning[lora]"'
        ) from error
    make: Any = LoraConfig  # alpha need not be whole, whatever its annotation says
    return make(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        **options,
    )


def add_adapters(
    model: VipLlavaForConditionalGeneration,
    settings: AdapterSettings,
    *,
    seed: int = 0,
    config: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter beside every target, in place; the network keeps its class.

    They change nothing until they are trained: one of the two factors is zero. They are in training
    mode, and drop out, where the network is.

    Args:
        model: without adapters.
        settings: rank, scale and dropout.
        seed: decides the other factor, which is drawn on the CPU.
        config: peft's own, of a stored adapter, in place of the settings; it may name targets.
        dtype: of the adapters; the projector's, which trains as they do, if not given.

    Raises:
        ConfigError: peft is not installed, or the network has adapters already.
    """
    config = lora_config(settings) if config is None else config
    from peft import inject_adapter_in_model

    if adapter_parameters(model):
        raise ConfigError("the network has adapters already: merge them first")
    config.target_modules = config.target_modules or target_pattern(model)
    config.modules_to_save = None  # the projector trains by itself
    dtype = dtype or model.model.multi_modal_projector.linear_1.weight.dtype
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _weights_aside(model, dtype):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, cast("nn.Module", model))
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(dtype)
    model.train(model.training)


@contextmanager
def _weights_aside(model: VipLlavaForConditionalGeneration, dtype: torch.dtype) -> Iterator[None]:
    """Have the targets' weights look as if they were held in ``dtype``, and whole.

    peft gives an adapter the dtype of its weight, which would round the first values of one that
    trains in float32 beside a frozen weight in bfloat16. Nor can it see the shape of a weight
    that ZeRO-3 has taken apart; it only needs the device. Weights in few bits stay where they are.
    """
    layers: list[Any] = [model.get_submodule(name) for name in adapter_targets(model)]
    aside: list[tuple[Any, nn.Parameter]] = [
        (layer, layer.weight) for layer in layers if layer.weight.is_floating_point()
    ]
    for layer, weight in aside:
        hollow = torch.empty(0, dtype=dtype, device=weight.device)
        layer.weight = nn.Parameter(hollow, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in aside:
            layer.weight = weight


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' factors by their names in the network."""
    return {name: value for name, value in model.named_parameters() if _FACTOR.search(name)}


@torch.no_grad()
def merge_adapters(model: VipLlavaForConditionalGeneration) -> None:
    """Add every adapter to its weight, in place; what was adapted is a plain linear layer again.

    A weight in fewer bits gets the projector's dtype: rounded again it would not be what trained.
    """
    if not adapter_parameters(model):
        return
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    dtype = model.model.multi_modal_projector.linear_1.weight.dtype
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base: Any = layer.get_base_layer()
        (adapter,) = layer.active_adapters
        delta = layer.get_delta_weight(adapter)
        if type(base) is nn.Linear:
            weight: torch.Tensor = base.weight.data
        else:
            # On a CPU bitsandbytes repacks the bits at the first forward pass, which only saving
            # undoes.
            base.state_dict()
            weight = dequantize_module_weight(base).to(dtype)
        # The sum in float32: bfloat16 would round the small update away before it is added.
        merged = (weight.float() + delta.float().to(weight.device)).to(weight.dtype)
        plain = nn.Linear(*reversed(merged.shape), bias=base.bias is not None, device="meta")
        plain.weight = nn.Parameter(merged, requires_grad=False)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.data.to(merged.dtype), requires_grad=False)
        model.set_submodule(name, plain.train(layer.training))
    _forget_quantization(model)
    model.__dict__.pop("peft_config", None)
    model._hf_peft_config_loaded = False


def _forget_quantization(model: Any) -> None:
    """Take the marks of a quantised network off one that has no quantised layer left."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    for config in (model.config, model.config.text_config):
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
    model.hf_quantizer = None
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
