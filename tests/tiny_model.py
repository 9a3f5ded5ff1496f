"""The tiny random model of tests: its networks, and what its export says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.models.building import ModelSpec

META = ExportMeta(
    stage="finetune",
    chat_template="llava_v1",
    image_aspect="pad",
    image_size=28,
    image_seq_length=4,
    feature_layers=(-1, -2, 1),
    vision_tower="tower",
    language_model="language",
)


def tiny_spec(tiny_sources: Any) -> ModelSpec:
    """Return what the networks are made of: the session's tower and language model."""
    return ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.language_model,
        feature_layers=META.feature_layers,
        chat_template=META.chat_template,
        image_size=META.image_size,
    )


def tiny_parts(tiny_sources: Any, seed: int = 1) -> tuple[Any, Any]:
    """Return a network that looks at its input, and its tokenizer."""
    from vipllava.checkpoints.loading import build_model, load_tokenizer

    spec = tiny_spec(tiny_sources)
    tokenizer = load_tokenizer(spec)
    return build_model(spec, tokenizer, seed=seed), tokenizer


def save_tiny_export(tiny_sources: Any, folder: Path, seed: int = 1, **said: Any) -> Path:
    """Write an export of it, which says about itself what is given, and return its folder."""
    from vipllava.checkpoints.hf_format import save_export

    save_export(*tiny_parts(tiny_sources, seed), folder, replace(META, **said))
    return folder
