"""Sizes of the published parts, so that a forecast needs neither weights nor a hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import AutoConfig, CLIPVisionConfig, VipLlavaConfig

from vipllava.forecast.architecture import Architecture, architecture_of
from vipllava.models.building import ModelSpec, check_tower_config, network_config
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


def published_config(
    vision_tower: str, language_model: str, feature_layers: Sequence[int]
) -> VipLlavaConfig:
    """Return the config of a network of published parts, as far as sizes follow from it.

    Raises:
        ConfigError: the sizes of a part are in neither :data:`TOWERS` nor :data:`LANGUAGE_MODELS`.
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
