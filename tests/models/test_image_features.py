"""The tower is run as far as it is read, and the features are transformers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny_model import tiny_spec
from vipllava.checkpoints.loading import build_model
from vipllava.models.building import ModelSpec
from vipllava.models.towers import CLIP, image_features, normalise_pixels


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


@pytest.mark.parametrize(
    ("layers", "num_run"), [((-1, -2, 1), 3), ((-2, 0), 2), ((1,), 1), ((0,), 0)]
)
def test_no_block_behind_the_deepest_layer_is_run(spec, layers, num_run):
    model = build_model(replace(spec, feature_layers=layers))
    blocks = [m for m in model.model.vision_tower.modules() if type(m).__name__.endswith("Layer")]
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    expected = model.get_image_features(
        pixel_values=normalise_pixels(pixels, torch.float32, CLIP.preprocessing)
    ).pooler_output
    run = []
    for block in blocks:
        block.register_forward_hook(lambda *_: run.append(1))

    features = image_features(model, pixels)

    assert len(run) == num_run <= len(blocks)
    assert torch.equal(features, expected)
