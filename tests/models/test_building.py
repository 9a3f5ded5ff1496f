"""The assembled network: parts, ids, first weights, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlamaForCausalLM

from tests.tiny_model import tiny_spec
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.models.building import ModelSpec, image_seq_length
from vipllava.types import CheckpointError, ConfigError


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


def test_tokens_are_added_once_after_the_languages_own(spec):
    tokenizer = load_tokenizer(spec)

    assert len(tokenizer) == 261
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [259, 260]
    assert tokenizer.pad_token_id == 260
    assert tokenizer("a<image>b").input_ids == [1, 67, 259, 68]


def test_config_of_the_assembled_network(spec):
    model = build_model(spec)

    config = model.config
    assert config.image_token_id == 259
    assert config.image_seq_length == image_seq_length(spec) == 4
    assert config.pad_token_id == 260
    assert config.text_config.vocab_size == 320
    assert model.lm_head.weight.shape == (320, 32)
    assert model.get_input_embeddings().weight.shape == (320, 32)
    assert model.model.multi_modal_projector.linear_1.weight.shape == (32, 3 * 32)
    assert not model.training


def test_parts_keep_their_weights_and_new_rows_are_the_mean(spec):
    model = build_model(spec)
    tower = CLIPVisionModel.from_pretrained(spec.vision_tower).state_dict()
    language_model = LlamaForCausalLM.from_pretrained(spec.language_model)

    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, tower[name]), name
    for name, weight in model.model.language_model.layers.state_dict().items():
        assert torch.equal(weight, language_model.model.layers.state_dict()[name]), name
    for ours, theirs in (
        (model.get_input_embeddings(), language_model.get_input_embeddings()),
        (model.lm_head, language_model.lm_head),
    ):
        assert torch.equal(ours.weight[:259], theirs.weight)
        mean = theirs.weight.mean(dim=0)
        torch.testing.assert_close(ours.weight[259:], mean.expand(61, -1))


def test_projector_depends_on_the_seed_and_on_nothing_else(spec):
    tokenizer = load_tokenizer(spec)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_model(spec, tokenizer, seed=5).model.multi_modal_projector.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(spec, tokenizer, seed=5).model.multi_modal_projector.state_dict()
    other = build_model(spec, tokenizer, seed=6).model.multi_modal_projector.state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear_1.weight"], other["linear_1.weight"])
    assert torch.equal(first["projector_layernorm.weight"], torch.ones(96))
    assert first["linear_2.weight"].abs().max() <= 32**-0.5


def test_a_whole_clip_checkpoint_serves_as_tower(spec, tiny_sources):
    model = build_model(replace(spec, vision_tower=tiny_sources.clip))
    tower = CLIPVisionModel.from_pretrained(tiny_sources.clip)

    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ours = model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(ours, tower(pixels).last_hidden_state)


@pytest.mark.parametrize("family", ["language_model", "tied_language_model", "phi3"])
def test_a_saved_network_reopens_as_checkpoint(spec, tiny_sources, tmp_path, family):
    spec = replace(spec, language_model=getattr(tiny_sources, family))
    tokenizer = load_tokenizer(spec)
    model = build_model(spec, tokenizer, seed=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    opened = replace(spec, checkpoint=str(tmp_path))
    again = build_model(opened)

    assert len(load_tokenizer(opened)) == 261
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    is_tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert is_tied == (family == "tied_language_model")


def _saved(spec: ModelSpec, folder: Path) -> ModelSpec:
    tokenizer = load_tokenizer(spec)
    build_model(spec, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return replace(spec, checkpoint=str(folder))


def test_checkpoint_of_another_model_names_both(spec, tiny_sources, tmp_path):
    opened = replace(
        _saved(spec, tmp_path),
        language_model=tiny_sources.phi3,
        feature_layers=(-1, -2),
        name="phi",
    )

    with pytest.raises(CheckpointError) as error:
        build_model(opened)

    assert str(error.value).startswith(f"checkpoint {tmp_path} is of another model than phi: ")
    assert "feature layers (-1, -2, 1) (model (-1, -2))" in str(error.value)
    assert "language model type llama (model phi3)" in str(error.value)


def test_missing_keys_are_an_error_and_listed(spec, tmp_path):
    opened = _saved(spec, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    weights["stray"] = torch.zeros(1)
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError) as error:
        build_model(opened)

    message = str(error.value)
    assert "missing (1): model.multi_modal_projector.linear_1.bias" in message
    assert "unexpected (1): stray" in message
    assert "misshapen (1): model.multi_modal_projector.linear_2.bias (7,) (model (32,))" in message


def test_truncated_weights_are_an_error(spec, tmp_path):
    opened = _saved(spec, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match="cut short"):
        build_model(opened)


def test_missing_folder(spec):
    with pytest.raises(CheckpointError, match=r"vision_tower='\./nowhere' does not exist"):
        build_model(replace(spec, vision_tower="./nowhere"))


def test_folder_without_config(spec, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"without config\.json \(it holds notes\.txt\)"):
        build_model(replace(spec, language_model=str(tmp_path)))


def test_unreachable_hub_id(spec):
    with pytest.raises(CheckpointError, match="is no folder here and not in the cache"):
        build_model(replace(spec, vision_tower="nobody/no-such-model"))


def test_an_unknown_tower_lists_the_known(spec):
    known = (
        r"vision_tower='.*': 'llama' is no vision tower .*\(clip_vision_model, siglip_vision_model"
    )
    with pytest.raises(CheckpointError, match=known):
        build_model(replace(spec, vision_tower=spec.language_model))


def test_language_model_that_is_none(spec):
    with pytest.raises(CheckpointError, match="it is a 'clip_vision_model' model; name a causal"):
        build_model(replace(spec, language_model=spec.vision_tower))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(replace(spec, language_model=spec.vision_tower))


def test_checkpoint_that_is_no_vipllava(spec):
    with pytest.raises(CheckpointError, match="holds a 'llama' model, not a VipLlava"):
        build_model(replace(spec, checkpoint=spec.language_model))


def test_image_size_and_feature_layers_must_be_the_towers(spec):
    with pytest.raises(ConfigError, match="positions for 28 pixels"):
        build_model(replace(spec, image_size=112))
    with pytest.raises(ConfigError, match=r"feature_layers \[4, -5\] do not exist: .* 3 blocks"):
        build_model(replace(spec, feature_layers=(4, -5, 3, -4)))
    with pytest.raises(ConfigError, match="feature_layers is empty"):
        replace(spec, feature_layers=())


def test_config_json_carries_no_folder_of_this_machine(spec, tmp_path):
    opened = _saved(spec, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    assert spec.vision_tower not in json.dumps(config)
    assert spec.language_model not in json.dumps(config)
    assert opened.checkpoint == str(tmp_path)
