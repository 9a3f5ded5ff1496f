"""The sizes of a network as plain numbers: what its memory and its work follow from.

They are counted on a network without memory (the meta device), so that they hold for every kind of
language model: grouped queries, fused projections, biases, tied heads. Of the published parts they
follow from the numbers here, so that a forecast needs neither weights nor a hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, VipLlavaConfig

from vipllava.models.adapters import BLOCKS
from vipllava.models.building import (
    ModelSpec,
    check_tower_config,
    empty_network,
    network_config,
)
from vipllava.models.freezing import parameter_table, set_trainable
from vipllava.models.towers import num_patches, read_modules, tower_of
from vipllava.types import ConfigError

TOWERS: Final[Mapping[str, Mapping[str, int]]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "image_size": 336, "patch_size": 14,
    },
}  # fmt: skip
"""Vision towers by their id."""

_LLAMA_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "vocab_size", "num_tokens",
)  # fmt: skip


def _llama(*sizes: int, **others: Any) -> Mapping[str, Any]:
    return {"model_type": "llama", **dict(zip(_LLAMA_SIZES, sizes, strict=True)), **others}


LANGUAGE_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": _llama(4096, 11008, 32, 32, 32, 32000, 32000),
    "lmsys/vicuna-13b-v1.5": _llama(5120, 13824, 40, 40, 40, 32000, 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama(4096, 14336, 32, 32, 8, 128256, 128256),
    "microsoft/Phi-3-mini-4k-instruct": _llama(
        3072, 8192, 32, 32, 32, 32064, 32011, model_type="phi3", pad_token_id=32000
    ),
}
"""Language models by their id; ``num_tokens`` is their tokenizer's."""

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


def published_config(
    vision_tower: str, language_model: str, feature_layers: Sequence[int]
) -> VipLlavaConfig:
    """Return the config of a network of published parts, as far as sizes follow from it.

    A ConfigError names a part in neither :data:`TOWERS` nor :data:`LANGUAGE_MODELS`.
    """
    for role, name, known in (
        ("vision_tower", vision_tower, TOWERS),
        ("language_model", language_model, LANGUAGE_MODELS),
    ):
        if name not in known:
            raise ConfigError(
                f"the sizes of {role}={name} do not ship with this package; known: "
                f"{', '.join(known)}. `train.py preflight=true` reads them from its config.json"
            )
    sizes = dict(LANGUAGE_MODELS[language_model])
    num_tokens = int(sizes.pop("num_tokens"))
    make_tower: Any = CLIPVisionConfig  # its signature knows no plain mapping
    return network_config(
        make_tower(**TOWERS[vision_tower]),
        AutoConfig.for_model(**sizes, tie_word_embeddings=False),
        feature_layers=feature_layers,
        num_tokens=num_tokens + 2,  # image and padding
        image_token_id=num_tokens,
    )


def published_architecture(
    vision_tower: str, language_model: str, feature_layers: Sequence[int]
) -> Architecture:
    """Return the sizes of a network of published parts; see :func:`published_config`."""
    return architecture_of(published_config(vision_tower, language_model, feature_layers))


def is_published(spec: ModelSpec) -> bool:
    """Whether the sizes of both parts ship with this package."""
    return spec.vision_tower in TOWERS and spec.language_model in LANGUAGE_MODELS


def sizes_of_published(spec: ModelSpec) -> Architecture:
    """Return the sizes of a spec's network without any file of it; checks it like its files."""
    config: Any = published_config(spec.vision_tower, spec.language_model, spec.feature_layers)
    check_tower_config(config.vision_config, spec)
    return architecture_of(config)
