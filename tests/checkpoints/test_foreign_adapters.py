"""Adapters of other trainers: of some layers, with other names, or why they cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from transformers import VipLlavaForConditionalGeneration

from tests.models.test_adapters import SMALL, logits_of
from vipllava.checkpoints.adapter_format import write_llava_adapter
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.loading import open_source
from vipllava.types import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
LANGUAGE = r"model\.language_model.*\.(q_proj|v_proj)"


@pytest.fixture
def base(make_export) -> Path:
    return make_export()


@pytest.fixture
def make_foreign(base, tmp_path):
    """Train an adapter with peft alone; return its folder and what it answers."""
    from peft import LoraConfig, get_peft_model

    def make(**options):
        config = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": LANGUAGE}
        config = LoraConfig(**config | options)
        model = get_peft_model(VipLlavaForConditionalGeneration.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    shape = parameter.shape
                    parameter.add_(torch.randn(shape, generator=generator) * 0.2)
        folder = tmp_path / "foreign"
        model.save_pretrained(folder)
        change(folder, base_model_name_or_path=str(base))
        return folder, logits_of(model.eval())

    return make


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder: Path, old: str, new: str) -> list[str]:
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sorted(tensors)


def answers(folder: Path) -> torch.Tensor:
    return logits_of(open_source(str(folder)).network())


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 8),
        ({"target_modules": ["q_proj", "v_proj"]}, 20),  # a list matches the tower's layers, too
        ({"target_modules": LANGUAGE, "layers_to_transform": [1]}, 4),
        ({"use_rslora": True}, 8),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, 8),
        ({"modules_to_save": ["lm_head"]}, 9),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_some_layers_are_enough(make_foreign, base, options, count):
    if "layers_to_transform" in options:
        options["target_modules"] = ["q_proj", "v_proj"]
        options["layers_pattern"] = "language_model.layers"
        options["exclude_modules"] = r".*vision_tower.*"
    folder, expected = make_foreign(**options)
    assert len(load_file(folder / "adapter_model.safetensors")) == count
    plain = logits_of(VipLlavaForConditionalGeneration.from_pretrained(base))
    assert (expected - plain).abs().max() > 0.1
    assert (answers(folder) - expected).abs().max() <= 1e-4


def test_names_of_transformers_4_and_of_peft_in_memory(make_foreign):
    folder, expected = make_foreign(target_modules=["q_proj", "v_proj"])
    names = rename(folder, "model.model.language_model.", "model.language_model.model.")
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    rename(folder, "model.model.vision_tower.", "model.vision_tower.vision_model.")
    assert (answers(folder) - expected).abs().max() <= 1e-4
    rename(folder, ".weight", ".default.weight")
    assert (answers(folder) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, r"has use_dora=True, which is not done here: merge the adapter with"),
        ({"bias": "all"}, r"has bias='all', which is not done here"),
        ({"init_lora_weights": "pissa"}, r"has init_lora_weights='pissa', which is not done here"),
        ({"r": 8}, r"misshapen \(8\): .*lora_A\.weight \(4, 32\) \(base \(8, 32\)\)"),
        ({"peft_type": "IA3"}, r"is no LoRA adapter but a IA3Config"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_read_has_its_true_reason(make_foreign, options, reason):
    folder, _ = make_foreign()
    change(folder, **options)
    with pytest.raises(CheckpointError, match=reason):
        answers(folder)


def test_what_is_no_linear_layer_is_listed(make_foreign):
    folder, _ = make_foreign()
    rename(folder, "layers.0.self_attn.q_proj", "embed_tokens")
    with pytest.raises(
        CheckpointError, match=r"unknown \(2\): model\.language_model\.embed_tokens"
    ):
        answers(folder)
    save_file({}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds no factors \(\*\.lora_A\.weight\)"):
        answers(folder)


def test_the_originals_folder_takes_what_the_original_has(make_foreign, make_spec, tmp_path, base):
    folder, _ = make_foreign()
    meta = json.loads((base / "vipllava.json").read_text())
    meta["language_model"] = make_spec().language_model
    (base / "vipllava.json").write_text(json.dumps(meta))
    done = convert(str(folder), tmp_path / "original", format="llava-lora")
    assert done.agreement.difference == 0
    config = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]

    change(folder, use_rslora=True)
    with pytest.raises(CheckpointError, match="has use_rslora=True, and the original's adapters"):
        convert(str(folder), tmp_path / "more", format="llava-lora")
    assert not (tmp_path / "more").exists()
    tower, _ = make_foreign(target_modules=["q_proj"])
    model = open_source(str(tower)).network(merge_adapter=False)
    with pytest.raises(CheckpointError, match=r"model\.vision_tower\..* is not: use format=lora-m"):
        write_llava_adapter(tmp_path, model, replace(SMALL, r=4), base="x")
