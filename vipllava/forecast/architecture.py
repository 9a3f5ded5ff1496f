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
from vipllava.models.opening import feature_layers_of
from vipllava.models.towers import num_patches, tower_of


@dataclass(frozen=True, slots=True)
class Tower:
    """The vision tower's sizes."""

    num_parameters: int  # of all of it
    read_parameters: int  # of what decides the features, which is what can train
    width: int  # of its hidden states
    mlp_width: int  # of its MLPs
    num_heads: int  # of its attention
    num_blocks: int  # all of them
    deepest_block: int  # how many of them the projector needs
    block_parameters: int  # of one block
    block_linear_parameters: int  # weights of its linear layers
    patch_parameters: int  # of the patch embedding
    num_patches: int  # of one image, the class token left out
    num_prefix_tokens: int  # positions before those of the patches, such as a class token
    num_feature_layers: int  # hidden states that the projector reads
    image_size: int  # side of an image, pixels

    @property
    def num_positions(self) -> int:
        """Positions of its hidden states."""
        return self.num_prefix_tokens + self.num_patches


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The language model's sizes."""

    num_parameters: int  # embeddings, blocks, last norm and head; a tied head counts once
    embedding_parameters: int  # of the token embeddings
    block_parameters: int  # of one block
    # Inputs and outputs of the linear layers of one block, in order.
    block_linears: tuple[tuple[int, int], ...]
    width: int  # of its hidden states
    mlp_width: int  # of its MLPs
    num_blocks: int  # decoder blocks
    num_heads: int  # of its queries
    num_key_value_heads: int  # of its keys and values
    head_dim: int  # width of one head
    vocabulary: int  # rows of embeddings and head
    tied: bool  # whether the head is the embeddings

    @property
    def linear_parameters(self) -> int:
        """Weights of the blocks' linear layers: what adapters go beside and few bits replace."""
        return self.num_blocks * sum(i * o for i, o in self.block_linears)

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

    tower: Tower  # the vision tower
    # Inputs and outputs of the projector's linear layers.
    projector_linears: tuple[tuple[int, int], ...]
    projector_parameters: int  # of the projector
    language_model: LanguageModel  # embeddings, decoder blocks and head

    @property
    def num_parameters(self) -> int:
        """Weights of all parts, adapters left out."""
        language_model = self.language_model.num_parameters
        return self.tower.num_parameters + self.projector_parameters + language_model


def architecture_of(config: VipLlavaConfig) -> Architecture:
    """Count a network's sizes from its config alone.

    Args:
        config: see :func:`vipllava.models.building.network_config`.
    """
    model: Any = empty_network(config, torch.float32)
    set_trainable(model, ("vision_tower",))
    table = parameter_table(model)
    counts = {row.part: row.num_parameters for row in table}
    sizes: Any = config
    text, vision = sizes.text_config, sizes.vision_config
    block: nn.Module = model.get_submodule(BLOCKS)[0]
    projector: nn.Module = model.model.multi_modal_projector
    tower_block, patches = _tower_parts(model.model.vision_tower)
    deepest = max(k % (vision.num_hidden_layers + 1) for k in feature_layers_of(config))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Architecture(
        tower=Tower(
            num_parameters=counts["vision_tower"],
            read_parameters=sum(row.num_trainable for row in table),
            width=vision.hidden_size,
            mlp_width=max(max(sizes) for sizes in _linears(tower_block)),  # some configs lack it
            num_heads=vision.num_attention_heads,
            num_blocks=vision.num_hidden_layers,
            deepest_block=deepest,
            block_parameters=_count(tower_block),
            block_linear_parameters=sum(i * o for i, o in _linears(tower_block)),
            patch_parameters=_count(patches),
            num_patches=num_patches(vision),
            num_prefix_tokens=tower_of(vision).num_prefix_tokens,
            num_feature_layers=len(feature_layers_of(config)),
            image_size=vision.image_size,
        ),
        projector_linears=_linears(projector),
        projector_parameters=counts["projector"],
        language_model=LanguageModel(
            num_parameters=counts["language_model"],
            embedding_parameters=_count(model.get_input_embeddings()),
            block_parameters=_count(block),
            block_linears=_linears(block),
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            num_blocks=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=head_dim,
            vocabulary=text.vocab_size,
            tied=model.lm_head.weight is model.get_input_embeddings().weight,
        ),
    )


def _tower_parts(tower: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a block and the patch embedding, wherever this release of transformers has them."""
    blocks = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    return blocks[0], next(m for m in tower.modules() if isinstance(m, nn.Conv2d))


def _linears(module: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple(
        (m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
