"""A model on disk, as a stage leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def export(tiny_sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the export of a tiny random network and return its folder."""
    from vipllava.checkpoints.export_meta import ExportMeta
    from vipllava.checkpoints.hf_format import save_export
    from vipllava.checkpoints.loading import build_model, load_tokenizer
    from vipllava.models.building import ModelSpec

    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.language_model,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )
    tokenizer = load_tokenizer(spec)
    folder = tmp_path_factory.mktemp("model") / "export"
    meta = ExportMeta("finetune", "llava_v1", "pad", 28, 4, (-1, -2, 1), "a", "b")
    save_export(build_model(spec, tokenizer, seed=1), tokenizer, folder, meta)
    return folder
