"""Files from elsewhere: other prefixes, older torch, what is no weights at all, old configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoints.conftest import LAYERS
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.llava_format import read_projector
from vipllava.checkpoints.loading import build_model, open_source
from vipllava.models.hub_models import content_digest, is_hub_id, local_folder
from vipllava.models.tensor_files import open_tensors, read_tensor
from vipllava.types import CheckpointError, ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 13476839\n"


@pytest.fixture
def projector(make_export, tmp_path) -> Path:
    convert(str(make_export()), tmp_path / "projector", format="projector")
    (tmp_path / "projector" / "mm_projector.safetensors").unlink()
    return tmp_path / "projector" / "mm_projector.bin"


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.model.", "_forward_module.model.", "base_model.model.model."]
)
def test_a_projector_whatever_was_wrapped_around_the_network(projector, prefix):
    tensors = torch.load(projector, weights_only=True)
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    expected = {name: read_tensor(t).clone() for name, t in read_projector(projector).items()}
    torch.save({prefix + name: tensor for name, tensor in plain.items()}, projector)
    found = read_projector(projector)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(read_tensor(found[name]), tensor)


def test_a_projector_twice(projector):
    tensors = torch.load(projector, weights_only=True)
    torch.save(tensors | {f"module.{name}": t for name, t in tensors.items()}, projector)
    with pytest.raises(CheckpointError, match="holds weights twice, under several prefixes"):
        read_projector(projector)


def test_parts_of_zero_3_are_called_that(projector):
    tensors = torch.load(projector, weights_only=True)
    torch.save({name: torch.empty(0) for name in tensors}, projector)
    with pytest.raises(CheckpointError) as error:
        read_projector(projector)
    assert "holds 6 tensors without a value, model.mm_projector.clip_layernorm" in str(error.value)
    assert "under ZeRO-3, where each process holds a part; gather" in str(error.value)


def test_files_of_before_pytorch_1_6(projector):
    tensors = torch.load(projector, weights_only=True)
    torch.save(tensors, projector, _use_new_zipfile_serialization=False)
    found = open_tensors(projector, "projector")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POINTER, "is a Git LFS pointer, which stands for the file: run `git lfs pull` in its"),
        ("\n<!DOCTYPE html>\n<html>", "is a web page in place of the file: download it with `hf"),
        ("", "is empty: download or copy it again"),
    ],
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "mm_projector.bin", "1.ckpt"]
)
def test_what_stands_in_the_place_of_a_file(make_export, tmp_path, name, text, message):
    folder = make_export() if name[-4:] in ("json", "sors") else tmp_path
    (folder / name).write_text(text)
    read = read_projector if name == "mm_projector.bin" else open_source
    options = {"base": str(make_export())} if name == "1.ckpt" else {}
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        read(folder / name if folder == tmp_path else folder, **options)


def test_the_image_tokens_follow_from_the_tower(make_export):
    export = make_export()
    (export / "vipllava.json").unlink()
    path = export / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("image_seq_length") == 4
    for stated in ({}, {"image_seq_length": 576}):
        path.write_text(json.dumps(config | stated))
        opened = open_source(str(export))
        assert opened.config.image_seq_length == opened.meta.image_seq_length == 4
    convert(str(export), export.with_name("again"))


def test_a_tower_without_the_layers_is_said(make_export, tmp_path, tiny_sources):
    tower = {"vision_tower": tiny_sources.vision_tower}
    convert(str(make_export()), tmp_path / "llava", format="llava", **tower)
    (tmp_path / "llava" / "vipllava.json").unlink()
    with pytest.raises(ConfigError, match=r"feature_layers \[-5, -8, -11, 6\] do not exist: .* 3"):
        open_source(str(tmp_path / "llava"), **tower)
    assert open_source(str(tmp_path / "llava"), feature_layers=LAYERS, **tower).kind == "llava"


def test_names_with_a_paths_form_are_no_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "7b-finetune").mkdir(parents=True)
    assert is_hub_id("mucai/vip-llava-7b")
    assert is_hub_id("gpt2")
    for path in ("runs/nope", "models/7b", "a/b/c", "./x/y", "/x", "x/mm_projector.bin", "runs"):
        assert not is_hub_id(path)
    message = r"checkpoint='runs/7b-finetun' does not exist \(did you mean runs/7b-finetune\?\)"
    with pytest.raises(CheckpointError, match=message):
        local_folder("runs/7b-finetun", "checkpoint")


def test_a_digest_is_of_what_is_there(make_export, tmp_path):
    export = make_export()
    copied = tmp_path / "elsewhere" / "copy"
    convert(str(export), copied)
    first = content_digest(str(export))
    assert content_digest(str(tmp_path / "nothing")) is None
    assert first != content_digest(str(copied))  # it has a file more
    (copied / "conversion.json").unlink()
    assert first == content_digest(str(copied))
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert first != content_digest(str(copied))
    assert content_digest(str(export / "config.json")) != first


def test_a_checkpoint_in_its_runs_folder_knows_what_it_began_with(make_export, make_spec, tmp_path):
    export = make_export()
    spec = make_spec(checkpoint=str(export))
    model = build_model(spec)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias.add_(1)
    state = {f"model.{n}": p for n, p in model.named_parameters() if "projector" in n}
    checkpoint = tmp_path / "run" / "checkpoints" / "000002.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": state}, checkpoint)
    with pytest.raises(CheckpointError, match="needs what the run started from under it: pass b"):
        open_source(str(checkpoint))
    parts = {name: getattr(spec, name) for name in ("vision_tower", "language_model", "image_size")}
    parts |= {"feature_layers": list(LAYERS), "chat_template": "llava_v1"}
    stage = {"name": "task", "chat_template": "plain", "image_aspect": "square"}
    job = {"stage": stage, "module": {"model": parts | {"checkpoint": str(export)}}}
    (tmp_path / "run" / "job.yaml").write_text(yaml.safe_dump(job))

    opened = open_source(str(checkpoint))
    assert (opened.kind, opened.meta.stage) == ("training_state", "task")
    assert (opened.meta.chat_template, opened.meta.image_aspect) == ("plain", "square")
    found = opened.network().state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight), name
    again = build_model(make_spec(checkpoint=str(checkpoint)))  # a stage may begin with it
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert open_source(str(checkpoint), chat_template="llava_v0").meta.chat_template == "llava_v0"
