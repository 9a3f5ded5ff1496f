"""Formats into each other: the same weights to the last bit, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, VipLlavaForConditionalGeneration

from tests.checkpoints.conftest import FAMILIES, LAYERS
from tests.checkpoints.released_network import released_logits
from vipllava.checkpoints import convert as convert_module
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.export_meta import load_meta
from vipllava.checkpoints.loading import build_model, load_tokenizer, open_source
from vipllava.checkpoints.names import hf_to_hf
from vipllava.models.tensor_files import read_tensor
from vipllava.types import CheckpointError, ConfigError

MODEL_TYPES = {"phi3": "llava_phi3", "mistral": "llava_mistral"}
ORIGINAL = [family for family in FAMILIES if family != "qwen2"]
UNTIED = [family for family in ORIGINAL if family != "tied_language_model"]


def weights(folder: Path, **options: object) -> dict[str, torch.Tensor]:
    opened = open_source(str(folder), **options)
    return {name: read_tensor(tensor) for name, tensor in opened.tensors.items()}


def files(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def tower(tiny_sources) -> dict:
    return {"vision_tower": tiny_sources.vision_tower, "feature_layers": LAYERS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_hf_is_the_identity(make_export, tmp_path, family, dtype):
    export = make_export(family, dtype=dtype)
    done = convert(str(export), tmp_path / "again")

    assert_same(files(export), files(tmp_path / "again"))
    assert done.agreement.difference == 0
    assert done.agreement.num_logits > 10_000
    assert load_meta(tmp_path / "again") == load_meta(export)
    for name in ("config.json", "tokenizer.json", "vipllava.json"):
        assert (tmp_path / "again" / name).read_text() == (export / name).read_text(), name


@pytest.mark.parametrize("family", ORIGINAL)
def test_ours_to_original_and_back_is_the_identity(make_export, tmp_path, tower, family):
    export = make_export(family)
    convert(str(export), tmp_path / "llava", format="llava", **tower)
    convert(str(tmp_path / "llava"), tmp_path / "hf", **tower)

    assert_same(files(export), files(tmp_path / "hf"))


def test_an_original_checkpoint_opens_without_a_word_of_warning(
    make_export, tmp_path, tower, caplog
):
    convert(str(make_export()), tmp_path / "llava", format="llava", **tower)
    caplog.clear()
    open_source(str(tmp_path / "llava"), **tower).network()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_family_that_the_original_lacks_is_refused(make_export, tmp_path):
    export = make_export("qwen2")
    with pytest.raises(CheckpointError, match=r"has no 'qwen2' language models.*use format=hf"):
        convert(str(export), tmp_path / "llava", format="llava")
    assert not (tmp_path / "llava").exists()


def test_trained_rows_behind_the_vocabulary_come_back(make_export, tmp_path, tower):
    export = make_export()
    path = export / "model.safetensors"
    changed = load_file(path)
    changed["language_model.lm_head.weight"][262] += 1
    save_file(changed, path, metadata={"format": "pt"})
    convert(str(export), tmp_path / "llava", format="llava", **tower)
    assert files(tmp_path / "llava")["lm_head.weight"].shape == (320, 32)
    convert(str(tmp_path / "llava"), tmp_path / "hf", **tower)

    assert_same(files(export), files(tmp_path / "hf"))


@pytest.mark.parametrize("family", UNTIED)
def test_the_original_format_is_what_the_original_network_reads(
    make_export, tiny_sources, tmp_path, tower, family
):
    export = make_export(family)
    convert(str(export), tmp_path / "llava", format="llava", **tower)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    before, after = [1, 70, 71], [80, 81, 82]

    clip = CLIPVisionModel.from_pretrained(tiny_sources.vision_tower)
    theirs = released_logits(tmp_path / "llava", clip, before, pixels, after, LAYERS)
    model = VipLlavaForConditionalGeneration.from_pretrained(export)
    ids = torch.tensor([[*before, 259, 259, 259, 259, *after]])
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=pixels).logits[0]

    assert theirs.shape == (10, 259)  # the language model's own vocabulary
    assert (ours[:, :259] - theirs).abs().max() <= 1e-5
    assert config["model_type"] == MODEL_TYPES.get(family, "llava_llama")
    assert {k: v for k, v in config.items() if k.startswith("mm_")} == {
        "mm_vision_tower": "clip_4layers_336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 96,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    assert (config["vocab_size"], config["image_aspect_ratio"]) == (259, "pad")


def original_folder(export: Path, folder: Path, tower: dict) -> Path:
    """An original folder as the released code writes it: pickled shards, its tower among them."""
    convert(str(export), folder, format="llava", **tower)
    path = folder / "model.safetensors"
    whole = load_file(path)
    path.unlink()
    names = sorted(whole)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: whole[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    # Buffers that transformers of that time stored.
    extra = torch.load(folder / "pytorch_model-00001-of-00002.bin", weights_only=True)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(extra, folder / "pytorch_model-00001-of-00002.bin")
    index["model.layers.0.self_attn.rotary_emb.inv_freq"] = "pytorch_model-00001-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("family", UNTIED)
def test_an_original_checkpoint_as_released_becomes_ours_and_answers_alike(
    make_export, make_spec, tmp_path, tower, family
):
    export = make_export(family)
    original = original_folder(export, tmp_path / "released", tower)
    done = convert(str(original), tmp_path / "hf", **tower)

    assert done.kind == "llava"
    assert_same(files(export), files(tmp_path / "hf"))
    # And it is what a training job starts from, without converting it first.
    spec = make_spec(family, checkpoint=str(original))
    model, expected = build_model(spec), build_model(replace(spec, checkpoint=str(export)))
    assert_same(dict(expected.state_dict()), dict(model.state_dict()))
    assert len(load_tokenizer(spec)) == 261


def test_a_stored_tower_is_taken_if_it_is_complete(make_export, tmp_path, tower, tiny_sources):
    export = make_export()
    original = original_folder(export, tmp_path / "released", tower)
    for path in original.glob("pytorch_model-*.bin"):
        tensors = torch.load(path, weights_only=True)
        torch.save({n: t + (".vision_tower." in n) for n, t in tensors.items()}, path)
    name = "vision_tower.vision_model.encoder.layers.0.layer_norm1.bias"
    ours = hf_to_hf(files(export), "ours")[name]
    assert torch.equal(weights(original, **tower)[name], ours + 1)

    index = json.loads((original / "pytorch_model.bin.index.json").read_text())
    lost = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    path = original / index["weight_map"].pop(lost)
    tensors = torch.load(path, weights_only=True)
    del tensors[lost]
    torch.save(tensors, path)
    (original / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(weights(original, **tower)[name], ours)


def test_the_projector_alone_starts_the_next_stage(make_export, make_spec, tmp_path, tower):
    export = make_export()
    convert(str(export), tmp_path / "projector", format="projector")
    stored = torch.load(tmp_path / "projector" / "mm_projector.bin", weights_only=True)
    assert sorted(stored) == [
        "model.mm_projector.clip_layernorm.bias",
        "model.mm_projector.clip_layernorm.weight",
        "model.mm_projector.final_linear.0.bias",
        "model.mm_projector.final_linear.0.weight",
        "model.mm_projector.final_linear.2.bias",
        "model.mm_projector.final_linear.2.weight",
    ]
    expected = open_source(str(export)).network().model.multi_modal_projector.state_dict()
    for source in ("projector", "projector/mm_projector.bin", "projector/mm_projector.safetensors"):
        spec = make_spec(checkpoint=str(tmp_path / source))
        assert_same(dict(build_model(spec).model.multi_modal_projector.state_dict()), expected)
    spec = make_spec()
    done = convert(
        str(tmp_path / "projector"), tmp_path / "whole", base=spec.language_model, **tower
    )
    assert done.kind == "projector"
    assert_same(files(export), files(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match="needs the language model under it: pass base="):
        convert(str(tmp_path / "projector"), tmp_path / "other", **tower)


def test_adapters_become_one_model(make_export, make_spec, tmp_path):
    pytest.importorskip("peft")
    from tests.models.test_adapters import SMALL, logits_of, train_a_little
    from vipllava.checkpoints.adapter_format import save_adapter
    from vipllava.models.adapters import add_adapters

    export = make_export()
    model = open_source(str(export)).network()
    add_adapters(model, SMALL)
    train_a_little(model)
    adapter = save_adapter(
        model, tmp_path / "adapter", load_meta(export), base=str(export), settings=SMALL
    )
    done = convert(str(adapter), tmp_path / "merged", format="lora-merged")

    assert done.kind == "lora"
    assert 0 < done.agreement.difference < 1e-3
    merged = VipLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert (logits_of(merged) - logits_of(model)).abs().max() <= 1e-4
    with pytest.raises(CheckpointError, match="it has no adapter; use format=hf"):
        convert(str(export), tmp_path / "other", format="lora-merged")


def test_adapters_as_the_originals_lora_runs_leave_them(make_export, make_spec, tmp_path):
    pytest.importorskip("peft")
    from tests.models.test_adapters import SMALL, logits_of, train_a_little
    from vipllava.checkpoints.adapter_format import save_adapter
    from vipllava.models.adapters import add_adapters

    export, spec = make_export(), make_spec()
    model = open_source(str(export)).network()
    add_adapters(model, SMALL)
    train_a_little(model)
    meta = replace(load_meta(export), language_model=spec.language_model)
    adapter = save_adapter(model, tmp_path / "adapter", meta, base=str(export), settings=SMALL)
    done = convert(str(adapter), tmp_path / "original", format="llava-lora")

    assert done.agreement.difference == 0
    assert {path.name for path in (tmp_path / "original").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "non_lora_trainables.bin",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llava_llama", 259)
    # On the language model it names, as the released code loads it.
    opened = open_source(
        str(tmp_path / "original"), vision_tower=spec.vision_tower, feature_layers=LAYERS
    )
    assert opened.kind == "llava_lora"
    assert (logits_of(opened.network()) - logits_of(model)).abs().max() <= 1e-5
    with pytest.raises(CheckpointError, match="it has no adapter; use format=hf or llava"):
        convert(str(export), tmp_path / "none", format="llava-lora")


def test_a_conversion_that_answers_otherwise_is_not_kept(make_export, tmp_path, monkeypatch):
    export = make_export()
    convert(str(export), tmp_path / "there")
    before = files(tmp_path / "there")
    write = convert_module.save_export

    def damage(model, tokenizer, directory, meta):
        write(model, tokenizer, directory, meta)
        tensors = load_file(directory / "model.safetensors")
        tensors["multi_modal_projector.linear_2.weight"] *= 1.5
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(convert_module, "save_export", damage)
    with pytest.raises(CheckpointError, match="gives other answers than its source"):
        convert(str(export), tmp_path / "there")
    assert_same(files(tmp_path / "there"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [export.name, "there"]


@pytest.mark.parametrize("format", ["hf", "llava", "projector"])
def test_the_same_call_again_does_the_same(make_export, tmp_path, tiny_sources, format):
    export, out = make_export(), tmp_path / "out"
    # The source knows its feature layers, which are not the tower's usual ones.
    call = {"format": format, "vision_tower": tiny_sources.vision_tower}
    convert(str(export), out, **call)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert load_meta(out).feature_layers == LAYERS
    convert(str(export), out, **call)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    if format == "llava":  # and so does what was written
        opened = open_source(str(out))
        assert opened.meta == load_meta(out)
        assert (opened.meta.stage, opened.meta.chat_template) == ("gpt4v", "llava_v1")

    with pytest.raises(CheckpointError, match=r"out is the conversion of .* to format=.*: choose"):
        convert(f"{export}/", out, **call)
    (out / "mine.txt").touch()
    with pytest.raises(CheckpointError, match=r"did not write \(mine\.txt\), which would be lost"):
        convert(str(export), out, **call)
    assert (out / "mine.txt").is_file()


def test_an_export_of_a_run_is_not_replaced(make_export, tmp_path):
    export = make_export()
    other = make_export("phi3")
    before = files(other)
    with pytest.raises(CheckpointError, match=r"is no conversion \(it has no conversion\.json\)"):
        convert(str(export), other)
    assert_same(files(other), before)


def test_no_room_is_said_before_anything_is_written(make_export, tmp_path, monkeypatch):
    export = make_export()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GiB, and .* has 0\.00 GiB free"):
        convert(str(export), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_destination_within_the_source_is_refused(make_export):
    export = make_export()
    with pytest.raises(CheckpointError, match=r"sub lies in .*, or holds it: choose a folder"):
        convert(str(export), export / "sub")
    assert not (export / "sub").exists()


def test_a_destination_of_something_else_is_left_alone(make_export, tmp_path):
    export = make_export()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").touch()
    with pytest.raises(CheckpointError, match="exists and is no conversion"):
        convert(str(export), tmp_path / "letters")
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        convert(str(export), tmp_path / "letters" / "mum.txt")
    with pytest.raises(ConfigError, match="format='onnx' is not one of hf, llava, projector"):
        convert(str(export), tmp_path / "new", format="onnx")


def test_a_text_only_model_where_a_vipllava_is_wanted(tiny_sources, tmp_path):
    with pytest.raises(CheckpointError, match="holds a 'llama' model, not a VipLlava"):
        convert(tiny_sources.language_model, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without config\.json \(it holds nothing\)"):
        convert(str(tmp_path / "empty"), tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"'\./nowhere' does not exist"):
        convert("./nowhere", tmp_path / "new")


class Malice:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_with_code_is_refused(make_export, tmp_path, tower, capsys):
    original = original_folder(make_export(), tmp_path / "released", tower)
    path = original / "pytorch_model-00002-of-00002.bin"
    with path.open("wb") as file:
        pickle.dump({"model.norm.weight": Malice()}, file)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin (holds|cannot be read)"):
        convert(str(original), tmp_path / "new", **tower)
    torch.save({"model.norm.weight": Malice()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        convert(str(original), tmp_path / "new", **tower)
    assert "must not run" not in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_named(make_export, tmp_path, tower):
    export = make_export()
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*cut short"):
        convert(str(export), tmp_path / "new")
    path.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        convert(str(export), tmp_path / "new")


def test_a_lost_shard_is_named(make_export, tmp_path, tower):
    original = original_folder(make_export(), tmp_path / "released", tower)
    (original / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks pytorch_model-00002-of-00002\.bin, which"):
        convert(str(original), tmp_path / "new", **tower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "says vocab_size=300, but its embeddings have 259 rows"),
        ({"mm_hidden_size": 128}, "says mm_hidden_size=128, but its projector reads 96"),
        ({"mm_projector_type": "linear"}, "has mm_projector_type='linear', ViP-LLaVA has"),
        ({"num_hidden_layers": 3}, r"missing \(9\): model\.language_model\.layers\.2"),
        ({"intermediate_size": 64}, r"misshapen \(6\): .*gate_proj\.weight \(48, 32\)"),
    ],
)
def test_a_config_that_contradicts_its_weights(make_export, tmp_path, tower, change, message):
    original = original_folder(make_export(), tmp_path / "released", tower)
    path = original / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        convert(str(original), tmp_path / "new", **tower)
    assert not (tmp_path / "new").exists()


def test_unknown_and_missing_names_of_an_original_are_listed(make_export, tmp_path, tower):
    original = original_folder(make_export(), tmp_path / "released", tower)
    path = original / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.mm_projector.final_linear.4.weight"] = torch.zeros(2)
    torch.save(tensors, path)
    with pytest.raises(
        CheckpointError,
        match=r"unknown weights \(1\): model\.mm_projector\.final_linear\.4\.weight",
    ):
        convert(str(original), tmp_path / "new", **tower)


def test_a_projector_of_another_width_is_refused(make_export, make_spec, tmp_path):
    convert(str(make_export()), tmp_path / "projector", format="projector")
    spec = make_spec(checkpoint=str(tmp_path / "projector"), feature_layers=(-1, 1))
    with pytest.raises(CheckpointError, match=r"projector_layernorm\.weight of shape \(96,\).*64"):
        build_model(spec)
