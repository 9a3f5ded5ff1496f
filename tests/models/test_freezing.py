from __future__ import annotations

import pytest

from vipllava.checkpoints.loading import build_model
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import ParameterRow, parameter_table, set_trainable
from vipllava.types import ConfigError


@pytest.fixture
def model(tiny_sources):
    return build_model(
        ModelSpec(
            vision_tower=tiny_sources.vision_tower,
            language_model=tiny_sources.tied_language_model,
            feature_layers=(-1, 1),
            chat_template="llava_v1",
            image_size=28,
        )
    )


def test_parts_train_as_named_and_tied_weights_count_once(model):
    set_trainable(model, ["projector", "language_model"])

    # Projector: LayerNorm 2 x 64, 64 x 32 + 32, 32 x 32 + 32.
    assert parameter_table(model) == (
        ParameterRow("vision_tower", 41648, 0),
        ParameterRow("projector", 3264, 3264),
        ParameterRow("language_model", 25760, 25760),
    )
    assert sum(p.numel() for p in model.parameters()) == 41648 + 3264 + 25760

    set_trainable(model, ["projector"])
    assert [row.num_trainable for row in parameter_table(model)] == [0, 3264, 0]


@pytest.mark.parametrize("parts", [["head"], [], ["projector", "projector"]])
def test_unknown_parts_list_the_known(model, parts):
    with pytest.raises(ConfigError, match="vision_tower, projector, language_model"):
        set_trainable(model, parts)
