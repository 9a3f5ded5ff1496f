"""Adapter folders: peft opens them alone, ours opens the original's, a wrong base is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import VipLlavaForConditionalGeneration

pytest.importorskip("peft")

from tests.models.test_adapters import SMALL, logits_of, train_a_little
from tests.tiny_model import META, tiny_spec
from vipllava.checkpoints.adapter_format import (
    load_adapter,
    save_adapter,
    stored_settings,
    write_llava_adapter,
)
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer, open_source
from vipllava.models.adapters import add_adapters
from vipllava.models.building import ModelSpec
from vipllava.types import CheckpointError


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


@pytest.fixture
def base(spec, tmp_path):
    model = build_model(spec, seed=1)
    return save_export(model, load_tokenizer(spec), tmp_path / "base", META)


@pytest.fixture
def trained(spec):
    model = build_model(spec, seed=1)
    add_adapters(model, SMALL, seed=2)
    train_a_little(model)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias.add_(0.5)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_alone_restores_adapters_and_projector(base, trained, tmp_path):
    from peft import PeftModel

    folder = save_adapter(trained, tmp_path / "adapter", META, base=str(base), settings=SMALL)
    model = VipLlavaForConditionalGeneration.from_pretrained(base)
    restored = PeftModel.from_pretrained(model, folder)

    assert (logits_of(restored) - logits_of(trained)).abs().max() <= 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert config["target_modules"].startswith(r"model\.language_model\.layers")


def test_an_adapter_folder_opens_merged_on_the_base_it_names(base, trained, tmp_path):
    folder = save_adapter(trained, tmp_path / "adapter", META, base=str(base), settings=SMALL)
    opened = open_source(str(folder))

    assert (opened.kind, opened.meta) == ("lora", META)
    assert stored_settings(folder) == SMALL
    assert (logits_of(opened.network()) - logits_of(trained)).abs().max() <= 1e-5


def test_the_originals_lora_folder_there_and_back(spec, trained, tmp_path):
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    write_llava_adapter(folder, trained, SMALL, base=spec.language_model)

    names = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert sorted(names)[0] == "base_model.model.model.mm_projector.clip_layernorm.bias"
    opened = open_source(
        str(folder), vision_tower=spec.vision_tower, feature_layers=spec.feature_layers
    )
    assert opened.kind == "llava_lora"
    assert (logits_of(opened.network()) - logits_of(trained)).abs().max() <= 1e-5
    again = build_model(replace(spec, checkpoint=str(folder)))
    assert torch.equal(logits_of(again), logits_of(opened.network()))


def test_a_wrong_base_is_refused_by_name_and_shape(spec, base, trained, tiny_sources, tmp_path):
    folder = save_adapter(trained, tmp_path / "adapter", META, base=str(base), settings=SMALL)
    phi = build_model(replace(spec, language_model=tiny_sources.phi3))
    before = set(phi.state_dict())

    with pytest.raises(CheckpointError) as error:
        load_adapter(phi, folder)
    message = str(error.value)
    assert "does not fit this base" in message
    assert "unknown (20): model.language_model.layers.0.mlp.gate_proj.lora_A.weight" in message
    assert "It was trained on another model (pass that one as base=" in message
    assert set(phi.state_dict()) == before

    fewer = build_model(replace(spec, feature_layers=(-1, 1)))
    with pytest.raises(CheckpointError, match=r"linear_1\.weight \(32, 96\) \(base \(32, 64\)\)"):
        load_adapter(fewer, folder)


def test_an_adapter_without_a_base_says_what_to_pass(trained, base, tmp_path):
    folder = save_adapter(trained, tmp_path / "adapter", META, base="", settings=SMALL)
    with pytest.raises(CheckpointError, match=r"needs the VipLlava under it: pass base="):
        open_source(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors or"):
        open_source(str(folder), base=str(base)).network()


def test_a_folder_of_something_else_is_not_replaced(trained, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").touch()
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        save_adapter(trained, tmp_path / "letters", META, base="x", settings=SMALL)
