"""Images to what the language model reads: normalised, through tower and projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.towers import feature_layers_of, preprocessing_of, tower_of
from vipllava.types import Preprocessing


def normalise_pixels(
    pixel_values: torch.Tensor, dtype: torch.dtype, preprocessing: Preprocessing
) -> torch.Tensor:
    """Turn images, uint8 [num_images, 3, height, width], into what a tower expects, in float32."""
    mean, std = (
        torch.tensor(values, device=pixel_values.device).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return ((pixel_values.float() / 255.0 - mean) / std).to(dtype)


def read_modules(
    model: VipLlavaForConditionalGeneration,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return what decides the features: the tower's modules before the blocks, and its blocks."""
    network, tower = model.model.vision_tower, tower_of(model.config.vision_config)
    blocks = list(network.get_submodule(tower.blocks).children())
    before = [network.get_submodule(name) for name in tower.before_blocks]
    return before, blocks[: max(_feature_layers(model.config))]


def read_parameters(model: VipLlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Return the weights of the vision tower that the features depend on."""
    unread = tower_of(model.config.vision_config).unread
    left_out = {id(model.model.vision_tower.get_parameter(name)) for name in unread}
    read = [p for modules in read_modules(model) for m in modules for p in m.parameters()]
    return [parameter for parameter in read if id(parameter) not in left_out]


def _feature_layers(config: Any) -> list[int]:
    """Return the hidden states that the projector reads, counted from the first."""
    return [k % (config.vision_config.num_hidden_layers + 1) for k in feature_layers_of(config)]


def image_features(
    model: VipLlavaForConditionalGeneration, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Run the tower, as far as it is read, and the projector.

    The numbers are those of ``model.get_image_features``, which runs every block of the tower: from
    uint8 [num_images, 3, height, width] to [num_images, image_seq_length, language model's width].
    """
    config: Any = model.config.vision_config
    layers = _feature_layers(model.config)
    before, blocks = read_modules(model)
    hidden = normalise_pixels(
        pixel_values, model.model.vision_tower.dtype, preprocessing_of(config)
    )
    for module in before:
        hidden = module(hidden)
    states = {0: hidden}
    for number, block in enumerate(blocks, start=1):
        hidden = block(hidden, attention_mask=None)
        if number in layers:
            states[number] = hidden
    first = tower_of(config).num_prefix_tokens
    read = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
    return model.model.multi_modal_projector(read)
