from __future__ import annotations

import pytest

from tests.models.tiny_batches import batch_of, three_samples
from vipllava.checkpoints.loading import build_model
from vipllava.forecast.architecture import architecture_of
from vipllava.forecast.memory import Setup, parameter_rows
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import ParameterRow, parameter_table, set_trainable
from vipllava.models.supervised_loss import supervised_loss_sum
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


def test_of_the_tower_trains_what_is_read(model):
    """Feature layers 1 and 2 of three blocks: the last one and the last norm decide nothing."""
    model.config.vision_feature_layers = [-2, 1]
    model.requires_grad_(True)
    samples = three_samples()
    supervised_loss_sum(model, batch_of([samples]))[0].backward()
    read = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    set_trainable(model, ["vision_tower", "projector", "language_model"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == read
    unread = {name.removeprefix("model.vision_tower.") for name, _ in model.named_parameters()}
    unread -= {name.removeprefix("model.vision_tower.") for name in read}
    assert {name.rsplit(".", 1)[0] for name in unread if "layers" not in name} == {"post_layernorm"}
    assert {name.split(".")[2] for name in unread if "layers" in name} == {"2"}

    # What forecasts count is what trains.
    tower = parameter_table(model)[0]
    setup = Setup(("vision_tower",), "full", "ddp", "32-true", 2, 1, 64)
    assert parameter_rows(architecture_of(model.config), setup)[0] == tower
    assert tower.num_trainable < tower.num_parameters


@pytest.mark.parametrize("parts", [["head"], [], ["projector", "projector"]])
def test_unknown_parts_list_the_known(model, parts):
    with pytest.raises(ConfigError, match="vision_tower, projector, language_model"):
        set_trainable(model, parts)
