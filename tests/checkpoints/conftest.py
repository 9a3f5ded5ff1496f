"""Tiny checkpoints of every language model family, in every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny_model
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.models.building import ModelSpec

LAYERS = (-1, -2, 1)
FAMILIES = ("language_model", "tied_language_model", "phi3", "mistral", "qwen2")
META = replace(tiny_model.META, stage="gpt4v")


@pytest.fixture
def make_spec(tiny_sources):
    def make(family: str = "language_model", **changes: object) -> ModelSpec:
        arguments: dict = {
            "vision_tower": tiny_sources.vision_tower,
            "language_model": getattr(tiny_sources, family),
            "feature_layers": LAYERS,
            "chat_template": "llava_v1",
            "image_size": 28,
        }
        return ModelSpec(**{**arguments, **changes})

    return make


@pytest.fixture
def make_export(make_spec, tmp_path):
    """Write a VipLlava in the Hugging Face format and return its folder."""

    def make(family: str = "language_model", *, dtype: str = "float32") -> Path:
        spec = make_spec(family, dtype=dtype)
        tokenizer = load_tokenizer(spec)
        folder = tmp_path / f"hf-{family}-{dtype}"
        return save_export(build_model(spec, tokenizer, seed=5), tokenizer, folder, META)

    return make
