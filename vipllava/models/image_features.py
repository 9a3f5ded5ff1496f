"""Pictures to what the language model reads: normalised, through tower and projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.building import feature_layers_field

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise_pixels(pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn uint8 pictures into what CLIP expects, on the device they are on.

    Args:
        pixel_values: uint8 [num_images, 3, height, width].
        dtype: of the result; the arithmetic is float32.

    Returns:
        ``dtype`` [num_images, 3, height, width], zero mean and unit variance by CLIP's constants.
    """
    mean = torch.tensor(CLIP_MEAN, device=pixel_values.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixel_values.device).view(1, 3, 1, 1)
    return ((pixel_values.float() / 255.0 - mean) / std).to(dtype)


def read_modules(model: VipLlavaForConditionalGeneration) -> tuple[nn.Module, ...]:
    """Return what :func:`image_features` runs of the vision tower.

    The rest, which is what comes behind the deepest feature layer, decides nothing.
    """
    tower: Any = model.model.vision_tower
    blocks = tower.encoder.layers[: max(_feature_layers(model))]
    return tower.embeddings, tower.pre_layrnorm, *blocks


def _feature_layers(model: VipLlavaForConditionalGeneration) -> list[int]:
    """Return the hidden states that the projector reads; 0 is what goes into the first block."""
    tower: Any = model.model.vision_tower
    count = len(tower.encoder.layers) + 1
    return [k if k >= 0 else count + k for k in getattr(model.config, feature_layers_field())]


def image_features(
    model: VipLlavaForConditionalGeneration, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Run the tower, as far as it is read, and the projector.

    The numbers are those of ``model.get_image_features``, which runs every block of the tower. A
    frozen tower records no graph: neither its weights nor the pixels ask for a gradient.

    Args:
        model: the network.
        pixel_values: uint8 [num_images, 3, height, width].

    Returns:
        [num_images, image_seq_length, hidden size of the language model].
    """
    tower: Any = model.model.vision_tower
    layers = _feature_layers(model)
    embeddings, norm, *blocks = read_modules(model)
    hidden = norm(embeddings(normalise_pixels(pixel_values, tower.dtype)))
    states = {0: hidden}
    for number, block in enumerate(blocks, start=1):
        hidden = block(hidden, attention_mask=None)
        if number in layers:
            states[number] = hidden
    read = torch.cat([states[layer][:, 1:] for layer in layers], dim=-1)  # [:, 0] is the class
    return model.model.multi_modal_projector(read)
