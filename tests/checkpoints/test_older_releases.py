"""What transformers 4 reads, in files that transformers 5 writes otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, VipLlavaConfig

from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.older_releases import add_rope, rename_tokenizer

WORDS = "A <image>\nWhat is within the red box?</s>"


@pytest.fixture
def tower(tiny_sources) -> str:
    return tiny_sources.vision_tower


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("format", ["hf", "llava"])
def test_a_rope_theta_of_its_own_survives_under_both_names(make_export, tmp_path, tower, format):
    export = make_export()
    config = read(export / "config.json")
    theta = {"rope_theta": 500000.0, "rope_type": "default"}
    text = config["text_config"] | {"rope_parameters": theta, "rope_theta": 500000.0}
    change(export / "config.json", text_config=text)
    convert(str(export), tmp_path / "out", format=format, vision_tower=tower)

    written = read(tmp_path / "out" / "config.json")
    text = written["text_config"] if format == "hf" else written
    assert (text["rope_theta"], text["rope_parameters"]) == (500000.0, theta)
    assert "rope_scaling" not in text
    if format == "hf":
        opened: Any = VipLlavaConfig.from_pretrained(tmp_path / "out")
        assert opened.text_config.rope_parameters == theta
        # As transformers 4 wrote it.
        del text["rope_parameters"]
        change(tmp_path / "out" / "config.json", text_config=text)
        opened = VipLlavaConfig.from_pretrained(tmp_path / "out")
        assert opened.text_config.rope_parameters == theta


def test_scaled_rope_has_its_former_name():
    llama_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    text = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **llama_3}}
    add_rope(text)
    assert text["rope_theta"] == 500000.0
    assert text["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", **llama_3}

    phi = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    phi["rope_parameters"]["partial_rotary_factor"] = 0.75
    add_rope(phi)
    assert (phi["rope_theta"], phi["partial_rotary_factor"]) == (1e4, 0.75)
    assert "rope_scaling" not in phi

    for none in ({}, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}):
        before = json.dumps(none)
        add_rope(none)
        assert json.dumps(none) == before


@pytest.mark.parametrize("format", ["hf", "llava"])
def test_the_tokenizer_has_a_class_that_every_release_knows(make_export, tmp_path, tower, format):
    export = make_export()
    assert read(export / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = AutoTokenizer.from_pretrained(export)(WORDS).input_ids
    assert ids[:6] == [1, 35, 223, 259, 201, 57]
    # As a Vicuna folder says.
    change(export / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    convert(str(export), tmp_path / "out", format=format, vision_tower=tower)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = read(tmp_path / "out" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert tokenizer.pad_token == "<pad>"


def test_further_special_tokens_have_their_former_name(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|end|>"]}'
    )
    rename_tokenizer(tmp_path)
    assert read(tmp_path / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|end|>"],
    }
