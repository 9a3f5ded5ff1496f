"""An export is complete, opens without this package with equal logits, and is read strictly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vipllava.checkpoints.export_meta import ExportMeta, load_meta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer, open_source
from vipllava.models.building import ModelSpec
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.stream.image_transform import reference_transform
from vipllava.types import CheckpointError


@pytest.fixture(scope="module", params=["language_model", "tied_language_model", "phi3"])
def parts(request, tiny_sources):
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=getattr(tiny_sources, request.param),
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
    )
    tokenizer = load_tokenizer(spec)
    meta = ExportMeta(
        stage="finetune",
        chat_template="llava_v1",
        image_aspect="pad",
        image_size=28,
        image_seq_length=4,
        feature_layers=(-1, -2, 1),
        vision_tower="a/tower",
        language_model="a/model",
    )
    return build_model(spec, tokenizer, seed=1), tokenizer, meta


@pytest.fixture
def export(parts, tmp_path) -> Path:
    return save_export(*parts[:2], tmp_path / "export", parts[2])


def _logits(model):
    input_ids = torch.tensor([[1, 5, 259, 259, 259, 259, 9, 8], [1, 4, 5, 6, 7, 8, 9, 10]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=input_ids, pixel_values=pixels).logits


def test_transformers_alone_gives_the_same_logits(parts, export):
    model = VipLlavaForConditionalGeneration.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)

    assert model.dtype == torch.float32
    assert (_logits(model) - _logits(parts[0])).abs().max() <= 1e-5
    assert tokenizer("a <image>b").input_ids == parts[1]("a <image>b").input_ids
    assert tokenizer.pad_token_id == model.config.pad_token_id == 260


def test_weights_have_the_names_of_published_checkpoints(parts, export):
    """However the network was built; older releases and other engines know these only."""
    names = set(load_file(export / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert ("language_model.lm_head.weight" in names) != parts[0].config.tie_word_embeddings
    loaded = VipLlavaForConditionalGeneration.from_pretrained(export)
    again = save_export(loaded, parts[1], export.with_name("again"), parts[2])
    assert set(load_file(again / "model.safetensors")) == names
    for name in ("config.json", "generation_config.json"):
        assert (again / name).read_text() == (export / name).read_text(), name


def test_an_export_opens_as_what_was_saved(parts, export):
    opened = open_source(str(export))
    model = opened.network()

    assert opened.meta == parts[2] == load_meta(export)
    assert not model.training
    assert len(opened.tokenizer) == len(parts[1])
    for name, weight in parts[0].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert opened.network(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_config_names_the_feature_layers_for_old_and_new_readers(export):
    config = json.loads((export / "config.json").read_text())

    assert config["vision_feature_layer"] == config["vision_feature_layers"] == [-1, -2, 1]
    assert config["image_token_index"] == 259
    assert config["image_seq_length"] == 4


@pytest.mark.parametrize("aspect", ["pad", "square", "resize"])
@pytest.mark.parametrize("size", [(61, 40), (30, 50)])
def test_the_processor_prepares_pictures_as_training_does(parts, tmp_path, aspect, size):
    export = save_export(*parts[:2], tmp_path / "export", replace(parts[2], image_aspect=aspect))
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = normalise_pixels(
        reference_transform(image, 28, aspect, CLIP.preprocessing)[None],
        torch.float32,
        CLIP.preprocessing,
    )

    processor = AutoProcessor.from_pretrained(export)
    inputs = processor(text="a <image>b", images=image, return_tensors="pt")
    alone = LlavaImageProcessorPil.from_pretrained(export)(image, return_tensors="pt")

    assert inputs["input_ids"].tolist() == [[1, 67, 223, 259, 259, 259, 259, 68]]
    # One grey level is 0.015 after normalising.
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0.016)
    assert torch.equal(alone["pixel_values"], inputs["pixel_values"])


def test_a_second_export_replaces_the_first_and_leaves_nothing_behind(parts, export):
    (export / "stray").touch()
    save_export(*parts[:2], export, replace(parts[2], stage="gpt4v"))

    assert load_meta(export).stage == "gpt4v"
    assert not (export / "stray").exists()
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_failed_export_keeps_the_old_one(parts, export, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(parts[1]), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_export(*parts[:2], export, replace(parts[2], stage="gpt4v"))

    assert load_meta(export).stage == "finetune"
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_folder_of_something_else_is_not_replaced(parts, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").touch()

    with pytest.raises(CheckpointError, match="is no export of a stage"):
        save_export(*parts[:2], tmp_path / "letters", parts[2])
    assert (tmp_path / "letters" / "mum.txt").is_file()


def test_meta_of_another_model_is_refused(parts, tmp_path):
    wrong = replace(parts[2], feature_layers=(-1, 1), image_aspect="wide")

    with pytest.raises(CheckpointError) as error:
        save_export(*parts[:2], tmp_path / "export", wrong)
    assert "feature_layers is (-1, 1) in vipllava.json, (-1, -2, 1) in the network" in str(
        error.value
    )
    assert "image_aspect is 'wide', not one of square, pad, resize" in str(error.value)


def test_missing_and_unexpected_keys_are_listed(export):
    path = export / "model.safetensors"
    weights = load_file(path)
    del weights["multi_modal_projector.linear_1.bias"]
    weights["multi_modal_projector.linear_3.bias"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError) as error:
        open_source(str(export)).network()
    assert "missing (1): model.multi_modal_projector.linear_1.bias" in str(error.value)
    assert "unexpected (1): " in str(error.value)
    assert "multi_modal_projector.linear_3.bias" in str(error.value)


def test_what_is_no_export(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"without config\.json \(it holds nothing\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version=99, this release reads 1"),
        ({"colour": "red"}, r"has unknown \['colour'\]"),
        ({"image_size": 30}, "image_size is 30 in vipllava.json, 28 in the network"),
        ({"image_token": "<picture>"}, "has no token '<picture>' with id 259"),
    ],
)
def test_broken_meta(export, change, message):
    path = export / "vipllava.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(CheckpointError, match=message):
        open_source(str(export))


def test_meta_that_is_no_json(export):
    (export / "vipllava.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vipllava\.json cannot be read"):
        load_meta(export)
