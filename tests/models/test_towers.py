"""Towers other than CLIP: one without a class token, and the one that docs/models.md adds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    VipLlavaForConditionalGeneration,
)

from tests.models.tiny_batches import batch_of, three_samples
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer, open_source
from vipllava.forecast.architecture import architecture_of
from vipllava.forecast.flops import tower_flops
from vipllava.forecast.memory import Setup, device_memory, parameter_rows
from vipllava.inference.engine import Engine, Request
from vipllava.models import towers
from vipllava.models.building import ModelSpec, load_tower_config
from vipllava.models.freezing import parameter_table, set_trainable
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.models.towers import image_features, normalise_pixels
from vipllava.stream.image_transform import ImageTransform, reference_transform
from vipllava.types import CheckpointError, ConfigError, Preprocessing, Turn

LAYERS = (-2, 0, 1)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
DOCS = Path(__file__).parents[2] / "docs/models.md"


@pytest.fixture(scope="module", autouse=True)
def documented_tower():
    """The registry with what the documentation's own block adds to it."""
    block = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "_TOWERS", dict(towers._TOWERS))
        exec(block[1], {})
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A whole SigLIP, both halves, and a DINOv2."""
    root = tmp_path_factory.mktemp("towers")
    vision = SiglipVisionConfig(**SIZES, intermediate_size=48)
    text = {**SIZES, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        both = SiglipConfig(text_config=text, vision_config=vision.to_dict())
        SiglipModel(both).save_pretrained(root / "siglip")
        Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)).save_pretrained(root / "dinov2")
    return {name: str(root / name) for name in ("siglip", "dinov2")}


@pytest.fixture(scope="module", params=["siglip", "dinov2"])
def spec(request, folders, tiny_sources) -> ModelSpec:
    return ModelSpec(
        vision_tower=folders[request.param],
        language_model=tiny_sources.language_model,
        feature_layers=LAYERS,
        chat_template="llava_v1",
        image_size=28,
        name=request.param,
    )


@pytest.fixture
def model(spec):
    return build_model(spec, seed=3)


@pytest.fixture
def export(spec, model, tmp_path) -> Path:
    meta = ExportMeta("finetune", "llava_v1", "pad", 28, 4, LAYERS, "a/tower", "a/model")
    return save_export(model, load_tokenizer(spec), tmp_path / "export", meta)


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 28, 28), generator=generator, dtype=torch.uint8)


def _reopened(export: Path, spec: ModelSpec, folder: Path, patch: pytest.MonkeyPatch):
    """As the model card says it."""
    if spec.name == "dinov2":
        return VipLlavaForConditionalGeneration.from_pretrained(export)
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    return AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)


def _logits(model, pixels):
    ids = torch.tensor([[1, 5, 259, 259, 259, 259, 9, 8], [1, 259, 259, 259, 259, 7, 8, 9]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def test_features_are_all_patches_of_the_towers_own_hidden_states(spec, model, pixels):
    prepared = normalise_pixels(
        pixels, torch.float32, towers.tower_of(model.config.vision_config).preprocessing
    )
    tower = AutoModel.from_pretrained(spec.vision_tower)
    tower = getattr(tower, "vision_model", tower).eval()
    with torch.no_grad():
        states = tower(prepared, output_hidden_states=True).hidden_states
        read = torch.cat([states[layer][:, -4:] for layer in LAYERS], dim=-1)
        expected = model.model.multi_modal_projector(read)
        assert states[0].shape[1] == (4 if spec.name == "siglip" else 5)
        assert torch.equal(image_features(model, pixels), expected)
        assert torch.equal(model.get_image_features(prepared).pooler_output, expected)


def test_of_the_tower_trains_what_is_read_and_a_step_lowers_the_loss(spec, model):
    batch = batch_of([three_samples()])
    model.requires_grad_(True)
    supervised_loss_sum(model, batch)[0].backward()
    read = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    set_trainable(model, ["vision_tower", "projector", "language_model"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == read
    unread = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("layernorm" in n or ".2." in n or "head" in n or "mask" in n for n in unread)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before, count = supervised_loss_sum(model, batch)
    before.backward()
    optimizer.step()
    assert count == 13
    assert supervised_loss_sum(model, batch)[0] < before


def test_the_loss_is_transformers_own(model, pixels):
    batch = batch_of([[sample] for sample in three_samples()], padding=0)
    loss, count = supervised_loss_sum(model, batch)
    prepared = normalise_pixels(
        batch.pixel_values,
        torch.float32,
        towers.tower_of(model.config.vision_config).preprocessing,
    )
    mask = (batch.segment_ids >= 0).long()
    logits = model(batch.input_ids, prepared, attention_mask=mask).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    assert count == 13
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_forecast_counts_what_is_built(spec, model):
    sizes = architecture_of(model.config)
    set_trainable(model, ["vision_tower"])
    setup = Setup(("vision_tower",), "full", "ddp", "32-true", 2, 1, 64)

    assert parameter_rows(sizes, setup)[0] == parameter_table(model)[0]
    assert sizes.tower.num_patches == 4
    positions, mlp_width = (4, 48) if spec.name == "siglip" else (5, 64)
    assert (sizes.tower.num_positions, sizes.tower.mlp_width) == (positions, mlp_width)
    # Two blocks of four 32 x 32 layers and an MLP, and the patch embedding with its bias.
    block = 2 * (4 * 32 * 32 + 2 * 32 * mlp_width) * positions + 4 * 32 * positions**2
    assert tower_flops(sizes.tower) == 2 * block + 2 * (3 * 14 * 14 * 32 + 32) * 4
    longer = replace(sizes, tower=replace(sizes.tower, num_prefix_tokens=9))
    assert device_memory(longer, setup).total > device_memory(sizes, setup).total


def test_an_export_opens_in_transformers_and_here_with_equal_logits(
    spec, model, export, pixels, tmp_path, monkeypatch
):
    prepared = normalise_pixels(pixels, torch.float32, Preprocessing((0.5,) * 3, (0.5,) * 3))
    expected = _logits(model, prepared)

    assert torch.equal(_logits(_reopened(export, spec, tmp_path, monkeypatch), prepared), expected)
    opened = open_source(str(export))
    assert torch.equal(_logits(opened.network(), prepared), expected)
    again = save_export(opened.network(), opened.tokenizer, tmp_path / "again", opened.meta)
    for path in export.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert convert(str(export), tmp_path / "converted").agreement.difference == 0


def test_the_exported_processor_prepares_images_as_training_does(spec, export):
    tower = towers.tower_of(load_tower_config(spec.vision_tower))
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    expected = normalise_pixels(
        reference_transform(image, 28, "pad", tower.preprocessing)[None],
        torch.float32,
        tower.preprocessing,
    )
    processor = AutoProcessor.from_pretrained(export)
    batch = processor(images=image, text="<image>", return_tensors="pt")

    assert (batch["pixel_values"] - expected).abs().max() < 1e-5
    assert batch["input_ids"].tolist()[0].count(259) == 4
    assert tuple(processor.image_processor.image_mean) == tower.preprocessing.mean


def test_the_engine_answers_with_it(export):
    engine = Engine.from_checkpoint(export, "cpu")
    request = Request(Image.new("RGB", (40, 20)), [Turn("user", "What?", has_image=True)])
    assert engine.image_transform.preprocessing == towers.preprocessing_of(
        engine.model.config.vision_config
    )
    assert engine.answer([request], max_new_tokens=3) == engine.answer([request], max_new_tokens=3)


def test_the_card_and_transformers_say_what_cannot_be(spec, export, pixels, tmp_path):
    card = (export / "README.md").read_text(encoding="utf-8")
    if spec.name == "dinov2":
        assert "trust_remote_code" not in card
    else:
        assert 'AutoModelForImageTextToText.from_pretrained("FOLDER", trust_remote_code' in card
        assert "reads all patches" in card
        plain = VipLlavaForConditionalGeneration.from_pretrained(export)
        with pytest.raises(ValueError, match="tokens: 8, features: 6"):
            _logits(plain, pixels.float())
    with pytest.raises(CheckpointError, match=r"no '\w+' towers, only clip_vision_model: use"):
        convert(str(export), tmp_path / "original", format="llava")


def test_missing_weights_are_named(spec, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tower"
    folder.mkdir()
    for path in Path(spec.vision_tower).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    gone = next(n for n in tensors if "text" not in n and "encoder" in n and "fc1.bias" in n)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=rf"missing \(1\): .*{gone.split('encoder')[1]}"):
        build_model(replace(spec, vision_tower=str(folder)))


def test_a_name_is_registered_once():
    with pytest.raises(ConfigError, match="'siglip_vision_model' is registered already"):
        towers.register_tower(towers.SIGLIP)


@pytest.mark.parametrize("spec", ["siglip"], indirect=True)
def test_a_folders_own_preprocessing_is_taken_and_travels(spec, tmp_path, pixels):
    """SigLIP 2 is of SigLIP's model_type and resizes with another filter."""
    folder = tmp_path / "siglip2"
    folder.mkdir()
    for path in Path(spec.vision_tower).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    own = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")
    spec = replace(spec, vision_tower=str(folder))
    model = build_model(spec, seed=3)
    meta = ExportMeta("finetune", "llava_v1", "resize", 28, 4, LAYERS, "a/tower", "a/model")
    export = save_export(model, load_tokenizer(spec), tmp_path / "export", meta)

    stated = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear")
    engine = Engine.from_checkpoint(export, "cpu")
    assert engine.image_transform.preprocessing == stated
    assert torch.equal(image_features(engine.model, pixels), image_features(model, pixels))
    assert not torch.equal(
        image_features(engine.model, pixels),
        image_features(build_model(replace(spec, vision_tower=spec.vision_tower)), pixels) * 0,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 90, 3), dtype=np.uint8))
    fast = ImageTransform(28, "resize", stated)(image).int()
    assert (fast - reference_transform(image, 28, "resize", stated).int()).abs().max() <= 1
    bicubic = replace(stated, resampling="bicubic")
    assert (fast - ImageTransform(28, "resize", bicubic)(image).int()).abs().max() > 1
    processor = AutoProcessor.from_pretrained(export).image_processor
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = normalise_pixels(engine.image_transform(image)[None], torch.float32, stated)
    assert (theirs - ours).abs().max() < 1.5 / 255 / 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "preprocessor_config.json cannot be read"),
        ('{"resample": 1}', r"says resample=1 instead of 2 \(bilinear\) or 3 \(bicubic\)"),
        ('{"rescale_factor": 1}', "rescale_factor=1 instead of 1/255"),
        ('{"do_normalize": false, "image_mean": [0.5]}', "do_normalize=false, image_mean="),
    ],
)
def test_preprocessing_that_is_not_done_here_is_an_error(folders, tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(Path(folders["siglip"], "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_tower_config(str(tmp_path))
