"""Every model of conf/model in its real size, on the meta device: the published numbers.

The published ``config.json`` files are written out below. The counts are known without this
package: a Llama-2 of 7B has 6 738 415 616 parameters, of 13B 13 015 864 320; Llama-3-8B has
8 030 261 248, Phi-3-mini 3 821 079 552, CLIP's ViT-L/14-336 303 507 456. The vocabulary then
grows by image and padding token to a multiple of 64 rows, in embeddings and head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vipllava.config.composing import compose_job
from vipllava.models.adapters import AdapterSettings, add_adapters
from vipllava.models.building import empty_network, load_tower_config, network_config
from vipllava.models.hub_models import load_config

CLIP = {
    "model_type": "clip",
    "projection_dim": 768,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
LLAMA_2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LANGUAGE_MODELS = {
    "7b": LLAMA_2
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    "13b": LLAMA_2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
    },
    "llama3_8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "phi3_mini": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "smollm2_135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}


@dataclass(frozen=True)
class Counts:
    """Parameters by part, and what the vocabulary becomes."""

    num_tokens: int  # of the published tokenizer
    image_token_id: int
    rows: int
    tower: int
    projector: int
    language_model: int
    adapter: int  # r 128


EXPECTED = {
    "7b": Counts(32000, 32000, 32064, 303507456, 37767168, 6738939904, 319815680),
    "13b": Counts(32000, 32000, 32064, 303507456, 52449280, 13016519680, 500695040),
    "llama3_8b": Counts(128256, 128256, 128320, 303507456, 37767168, 8030785536, 335544320),
    "phi3_mini": Counts(32011, 32011, 32064, 303507456, 25182208, 3821079552, 201326592),
    "smollm2_135m": Counts(49152, 49152, 49216, 2827200, 887808, 134551872, 39075840),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parameter_counts(name, tmp_path):
    expected = EXPECTED[name]
    spec = compose_job([f"model={name}", "trainer=cpu"]).model.spec
    tower = spec.vision_tower
    if not Path(tower).is_dir():
        assert tower == "openai/clip-vit-large-patch14-336"
        tower = str(tmp_path / "clip")
        _write(CLIP, tmp_path / "clip")
    _write(LANGUAGE_MODELS[name], tmp_path / "language_model")
    config = network_config(
        load_tower_config(tower),
        load_config(str(tmp_path / "language_model"), "language_model"),
        feature_layers=spec.feature_layers,
        num_tokens=expected.num_tokens + 2,
        image_token_id=expected.image_token_id,
    )
    model = empty_network(config, torch.bfloat16)

    assert config.text_config.vocab_size == expected.rows
    assert _count(model.model.vision_tower) == expected.tower
    assert _count(model.model.multi_modal_projector) == expected.projector
    whole = _count(model)
    assert whole - expected.tower - expected.projector == expected.language_model

    add_adapters(model, AdapterSettings(r=128, alpha=256, dropout=0.05))
    assert _count(model) - whole == expected.adapter


def _count(module) -> int:
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    return sum(parameter.numel() for parameter in module.parameters())


def _write(config: dict, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
