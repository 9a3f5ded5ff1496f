"""`lora-merged`: proven in float32 whatever the weights are written in; a wrong sum is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from transformers import VipLlavaForConditionalGeneration

from tests.models.test_adapters import SMALL, logits_of, train_a_little
from vipllava.checkpoints import convert as convert_module
from vipllava.checkpoints.adapter_format import save_adapter
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.export_meta import load_meta
from vipllava.checkpoints.loading import open_source
from vipllava.models.adapters import adapter_parameters, add_adapters, merge_adapters
from vipllava.types import CheckpointError

DROPPING = replace(SMALL, dropout=0.5)


@pytest.fixture
def make_adapter(make_export, make_spec, tmp_path):
    """Return an adapter with dropout on an export of some dtype, and what both answer together."""

    def make(dtype: str = "float32"):
        export = make_export(dtype=dtype)
        model = open_source(str(export)).network()
        add_adapters(model, DROPPING)
        train_a_little(model)
        meta = replace(load_meta(export), language_model=make_spec().language_model)
        folder = tmp_path / "adapter"
        return save_adapter(model, folder, meta, base=str(export), settings=DROPPING), model

    return make


def test_adapters_drop_out_where_their_network_trains(make_export):
    model = open_source(str(make_export())).network()
    add_adapters(model, DROPPING)
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.training for m in dropouts] == [False] * 14
    assert [m.training for m in model.train().modules() if m in dropouts] == [True] * 14


@pytest.mark.parametrize("format", ["lora-merged", "hf", "llava-lora"])
def test_adapters_with_dropout_are_converted(make_adapter, tmp_path, format):
    adapter, model = make_adapter()
    done = convert(str(adapter), tmp_path / "out", format=format)

    assert done.agreement.difference <= 1e-4 * done.agreement.spread
    if format == "lora-merged":
        merged = VipLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert (logits_of(merged) - logits_of(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_proven_in_thirty_two(make_adapter, tmp_path, dtype):
    adapter, model = make_adapter(dtype)
    done = convert(str(adapter), tmp_path / "out", format="lora-merged")

    assert done.dtype == dtype
    assert 0 < done.agreement.difference <= 1e-4 * done.agreement.spread
    merged = open_source(str(tmp_path / "out")).network(dtype=getattr(torch, dtype))
    merge_adapters(model)
    for name, weight in model.state_dict().items():  # rounded once
        assert torch.equal(merged.state_dict()[name], weight.to(merged.dtype)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_refused(make_adapter, tmp_path, monkeypatch, dtype):
    def merge_a_tenth_too_much(model):
        with torch.no_grad():
            for name, factor in adapter_parameters(model).items():
                if "lora_B" in name:
                    factor.mul_(1.1)
        merge_adapters(model)

    adapter, _ = make_adapter(dtype)
    monkeypatch.setattr(convert_module, "merge_adapters", merge_a_tenth_too_much)
    with pytest.raises(CheckpointError, match=r"merging the adapter of .* gives other answers"):
        convert(str(adapter), tmp_path / "out", format="lora-merged")
    assert not (tmp_path / "out").exists()


def test_an_adapter_opens_in_another_folder(make_adapter, tmp_path, monkeypatch):
    adapter, model = make_adapter()
    settings = {"base": "hf-language_model-float32", "settings": DROPPING}
    monkeypatch.chdir(tmp_path)
    meta = load_meta(adapter)
    save_adapter(model, adapter, meta, **settings)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = open_source("../adapter")
    assert opened.path == "../adapter"
    assert opened.network().num_parameters() > 0

    shutil.move(tmp_path / "hf-language_model-float32", tmp_path / "base")
    message = (
        r"\.\./adapter on the base that it names \(pass base=FOLDER_OR_ID for another one\): "
        r"checkpoint='/.*/hf-language_model-float32' does not exist"
    )
    with pytest.raises(CheckpointError, match=message):
        open_source("../adapter")
    assert open_source("../adapter", base="../base").kind == "lora"
