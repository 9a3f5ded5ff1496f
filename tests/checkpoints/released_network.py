"""The original network, written down again from its description, to read its checkpoints with.

Nothing here is shared with the package: weights are taken by their original names.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

FAMILIES = {
    "llava_llama": (LlamaConfig, LlamaForCausalLM),
    "llava_phi3": (Phi3Config, Phi3ForCausalLM),
    "llava_mistral": (MistralConfig, MistralForCausalLM),
}


def released_logits(
    folder: Path,
    tower: CLIPVisionModel,
    before: list[int],
    pixels: torch.Tensor,
    after: list[int],
    layers: tuple[int, ...],
) -> torch.Tensor:
    """Return the logits of text, picture, text: [positions, vocabulary]."""
    config = json.loads((folder / "config.json").read_text())
    make_config, make_model = FAMILIES[config["model_type"]]
    text = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    language_model = make_model(make_config(**text)).eval()
    weights = load_file(folder / "model.safetensors")
    own = language_model.state_dict()
    language_model.load_state_dict({name: weights.get(name, value) for name, value in own.items()})

    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([hidden[layer][:, 1:] for layer in layers], dim=-1)[0]
        part = "model.mm_projector."
        features = functional.layer_norm(
            features,
            features.shape[-1:],
            weights[part + "clip_layernorm.weight"],
            weights[part + "clip_layernorm.bias"],
            eps=1e-5,
        )
        for layer in ("final_linear.0", "final_linear.2"):
            weight, bias = weights[f"{part}{layer}.weight"], weights[f"{part}{layer}.bias"]
            features = functional.linear(features, weight, bias)
            if layer == "final_linear.0":
                features = functional.gelu(features)
        table = weights["model.embed_tokens.weight"]
        embeddings = torch.cat([table[before], features, table[after]])[None]
        return language_model(inputs_embeds=embeddings, use_cache=False).logits[0]
