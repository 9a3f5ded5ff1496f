"""The sizes of a network as plain numbers: what its memory and its work follow from.

They are counted on a network without memory (the meta device), so that they hold for every kind of
language model: grouped queries, fused projections, biases, tied heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import VipLlavaConfig

from vipllava.models.adapters import BLOCKS
from vipllava.models.building import empty_network
from vipllava.models.freezing import parameter_table, set_trainable
from vipllava.models.image_features import read_modules
from vipllava.models.towers import num_patches, tower_of

Linears = tuple[tuple[int, int], ...]  # inputs and outputs of linear layers, in order


@dataclass(frozen=True, slots=True)
class Blocks:
    """The sizes of a part that is made of alike transformer blocks."""

    num_parameters: int  # of the whole part; a head tied to the embeddings counts once
    num_blocks: int  # all of them
    block_parameters: int  # of one block
    block_linears: Linears  # of one block
    width: int  # of the hidden states
    mlp_width: int  # of the MLPs

    @property
    def block_linear_parameters(self) -> int:
        """Weights of one block's linear layers."""
        return sum(i * o for i, o in self.block_linears)

    @property
    def largest_linear(self) -> int:
        """Weights of the largest of them."""
        return max(i * o for i, o in self.block_linears)


@dataclass(frozen=True, slots=True)
class VisionTower(Blocks):
    """The vision tower's sizes."""

    read_parameters: int  # of what decides the features, which is what can train
    deepest_block: int  # how many blocks the projector needs
    patch_parameters: int  # of the patch embedding
    num_patches: int  # of one image, the class token left out
    num_prefix_tokens: int  # positions before those of the patches, such as a class token

    @property
    def num_positions(self) -> int:
        """Positions of its hidden states."""
        return self.num_prefix_tokens + self.num_patches


@dataclass(frozen=True, slots=True)
class LanguageModel(Blocks):
    """The sizes of embeddings, decoder blocks, last norm and head."""

    num_heads: int  # of the queries
    num_key_value_heads: int  # of keys and values
    head_dim: int  # width of one head
    vocabulary: int  # rows of embeddings and head

    @property
    def linear_parameters(self) -> int:
        """Weights of the blocks' linear layers: what adapters go beside and few bits replace."""
        return self.num_blocks * self.block_linear_parameters

    @property
    def head_parameters(self) -> int:
        """Weights that make logits of a hidden state, whether or not they are the embeddings'."""
        return self.width * self.vocabulary

    def adapter_parameters(self, rank: int) -> int:
        """Return the weights of adapters of that rank on every linear layer of the blocks."""
        return self.num_blocks * rank * sum(i + o for i, o in self.block_linears)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A whole network's sizes."""

    tower: VisionTower
    projector_linears: Linears
    projector_parameters: int
    language_model: LanguageModel


def architecture_of(config: VipLlavaConfig) -> Architecture:
    """Count a network's sizes; see :func:`vipllava.models.building.network_config`."""
    model: Any = empty_network(config, torch.float32)
    set_trainable(model, ("vision_tower",))
    tower, projector, language_model = parameter_table(model)
    sizes: Any = config
    text, vision = sizes.text_config, sizes.vision_config
    heads = text.num_attention_heads
    kind, network = tower_of(vision), model.model.vision_tower
    patch_embedding = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    tower_blocks = _sizes_of_blocks(vision, network.get_submodule(kind.blocks)[0])
    projector_linears = _linears(model.model.multi_modal_projector)
    return Architecture(
        VisionTower(
            num_parameters=tower.num_parameters,
            # Some configs lack it.
            mlp_width=max(map(max, tower_blocks["block_linears"])),
            read_parameters=tower.num_trainable,
            deepest_block=len(read_modules(model)[1]),
            patch_parameters=_count(patch_embedding),
            num_patches=num_patches(vision),
            num_prefix_tokens=kind.num_prefix_tokens,
            **tower_blocks,
        ),
        projector_linears,
        projector.num_parameters,
        LanguageModel(
            num_parameters=language_model.num_parameters,
            mlp_width=text.intermediate_size,
            num_heads=heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
            **_sizes_of_blocks(text, model.get_submodule(BLOCKS)[0]),
        ),
    )


def _sizes_of_blocks(config: Any, block: nn.Module) -> dict[str, Any]:
    return {
        "num_blocks": config.num_hidden_layers,
        "width": config.hidden_size,
        "block_parameters": _count(block),
        "block_linears": _linears(block),
    }


def _linears(module: nn.Module) -> Linears:
    return tuple(
        (m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
