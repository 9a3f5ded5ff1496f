"""Few bits for the language model's blocks, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")

from tests.models.test_adapters import SMALL, logits_of, train_a_little
from vipllava.checkpoints.loading import build_model
from vipllava.models.adapters import add_adapters, merge_adapters
from vipllava.models.building import ModelSpec
from vipllava.models.quantization import QuantizationSettings, quantization_config
from vipllava.types import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")


@pytest.fixture(scope="module")
def spec(tiny_sources) -> ModelSpec:
    return ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=tiny_sources.rows_of_64,
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.85)])
def test_only_the_blocks_are_held_in_few_bits(spec, bits, least):
    settings = QuantizationSettings(bits=bits, compute_dtype="float32")
    model = build_model(spec, quantization_config=quantization_config(settings))
    whole = build_model(spec)

    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    quantised = {name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")}
    assert quantised == {n for n in kinds if n.startswith("model.language_model.layers.")}
    assert len(quantised) == 14
    expected, found = logits_of(whole).flatten(), logits_of(model).float().flatten()
    assert torch.cosine_similarity(expected, found, dim=0) > least


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_few_bits_merge_into_whole_weights(spec, bits):
    settings = QuantizationSettings(bits=bits, compute_dtype="float32")
    model = build_model(spec, quantization_config=quantization_config(settings))
    add_adapters(model, SMALL)
    train_a_little(model)
    adapted = logits_of(model).float()
    merge_adapters(model)

    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    merged = logits_of(model).float()
    # 8 bits round the input of every layer, too, and a CPU multiplies 4 bits in bfloat16; whole
    # weights do neither. A wrong scale or layout would be off by more than the logits themselves.
    tolerance = 0.03 if bits == 4 else 0.05
    assert (merged - adapted).abs().max() <= tolerance * adapted.abs().max()


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"bits=3 must be 4 or 8; type='nf8' must be one of"):
        QuantizationSettings(bits=3, type="nf8")
    assert quantization_config(None) is None
