"""LoRA: which layers, that nothing else changes, and that merging is the sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from tests.tiny_model import tiny_spec
from vipllava.checkpoints.loading import build_model
from vipllava.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    adapter_targets,
    add_adapters,
    merge_adapters,
    target_pattern,
)
from vipllava.models.building import ModelSpec
from vipllava.types import ConfigError

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PHI3 = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
SMALL = AdapterSettings(r=4, alpha=8, dropout=0.0)


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


def logits_of(model) -> torch.Tensor:
    ids = torch.tensor([[1, 70, 259, 259, 259, 259, 80, 90]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits


def train_a_little(model) -> None:
    """Give both factors values, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize(
    ("family", "kinds"), [("language_model", (*LLAMA, *LLAMA_MLP)), ("phi3", PHI3)]
)
def test_targets_are_every_linear_layer_of_the_blocks_and_no_other(
    spec, tiny_sources, family, kinds
):
    model = build_model(replace(spec, language_model=getattr(tiny_sources, family)))

    expected = {f"model.language_model.layers.{i}.{kind}" for i in (0, 1) for kind in kinds}
    assert set(adapter_targets(model)) == expected
    add_adapters(model, SMALL)
    adapted = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(model)}
    assert adapted == expected
    assert set(adapter_targets(model)) == expected  # found again, factors left aside
    assert target_pattern(model).startswith(r"model\.language_model\.layers\.\d+\.")


def test_a_new_adapter_changes_nothing_and_depends_on_its_seed_only(spec):
    model, again, other = (build_model(spec) for _ in range(3))
    before = logits_of(model)
    state = torch.random.get_rng_state()
    add_adapters(model, SMALL, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    add_adapters(again, SMALL, seed=3)
    add_adapters(other, SMALL, seed=4)

    assert torch.equal(logits_of(model), before)
    first, second = adapter_parameters(model), adapter_parameters(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], p) for name, p in adapter_parameters(other).items())


@pytest.mark.parametrize("family", ["language_model", "tied_language_model", "phi3"])
def test_merged_logits_equal_adapter_logits(spec, tiny_sources, family):
    model = build_model(replace(spec, language_model=getattr(tiny_sources, family)))
    names = set(model.state_dict())
    plain = logits_of(model)
    add_adapters(model, SMALL)
    train_a_little(model)
    adapted = logits_of(model)
    merge_adapters(model)

    assert (adapted - plain).abs().max() > 0.1
    assert (logits_of(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert not adapter_parameters(model)
    assert set(model.state_dict()) == names


def test_adapters_have_the_projectors_dtype(spec):
    model = build_model(replace(spec, dtype="bfloat16"))
    add_adapters(model, SMALL)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}


def test_impossible_settings_and_a_second_adapter(spec):
    with pytest.raises(ConfigError, match=r"r=0 must be at least 1; alpha=-1 .*; dropout=1\.0"):
        AdapterSettings(r=0, alpha=-1, dropout=1.0)
    model = build_model(spec)
    add_adapters(model, SMALL)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapters(model, SMALL)
