"""Weights read one by one are those that transformers reads at once, and are nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_model import tiny_spec
from vipllava.checkpoints.loading import build_model, load_tokenizer, open_spec
from vipllava.models import building
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import hold_frozen, set_trainable
from vipllava.models.placing import OnDevice

META = OnDevice(torch.device("meta"))
"""Stands for a GPU: a device that is not the host."""
FAMILIES = ("language_model", "tied_language_model", "phi3", "mistral", "qwen2")


@pytest.fixture
def spec(tiny_sources) -> ModelSpec:
    return tiny_spec(tiny_sources)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_the_one_that_transformers_loads(
    spec, tiny_sources, family, dtype, monkeypatch
):
    spec = replace(spec, language_model=getattr(tiny_sources, family), dtype=dtype)
    ours = build_model(spec, seed=5)
    # Where weights and tensors are not one to one, transformers loads.
    monkeypatch.setattr(building, "one_to_one", lambda *arguments: None)
    theirs = build_model(spec, seed=5)

    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation == "sdpa"
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (
            dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs)
        )
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype, name
            assert found[name].requires_grad == value.requires_grad, name
            assert torch.equal(found[name], value), name
    tied = ours.lm_head.weight is ours.get_input_embeddings().weight
    assert tied == (family == "tied_language_model")
    assert not any(module.training for module in ours.modules())


def test_a_head_that_is_stored_beside_what_it_is_tied_to_loads(spec, tiny_sources, tmp_path):
    """Not one to one: a case for transformers, and placed like any other."""
    spec = replace(spec, language_model=tiny_sources.tied_language_model)
    tokenizer = load_tokenizer(spec)
    model = build_model(spec, tokenizer, seed=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (embeddings,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["language_model.lm_head.weight"] = tensors[embeddings].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    again = build_model(replace(spec, checkpoint=str(tmp_path)))
    placed = build_model(replace(spec, checkpoint=str(tmp_path)), placement=META)

    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert all(value.is_meta for value in placed.state_dict().values())


def test_every_weight_goes_to_the_device_as_the_file_has_it_and_is_cast_there(spec):
    """Cast on the host, a copy of the whole model would come to be there, one per process."""

    class Made(TorchDispatchMode):
        """Notes the dtypes of what comes to be on the host."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta:
                made.add(result.dtype)
            return result

    made: set[torch.dtype] = set()
    opened = open_spec(spec)
    parts: list[torch.dtype] = []

    def prepare(model) -> None:
        set_trainable(model, ["projector"])
        hold_frozen(model, torch.bfloat16)
        parts.extend(p.dtype for p in model.parameters())

    with Made():
        model = opened.network(placement=META, prepare=prepare)

    assert parts == [p.dtype for p in model.parameters()]
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    # The files are float32.
    assert torch.float32 in made
    assert torch.bfloat16 not in made


def test_a_callers_default_device_changes_no_value(spec):
    """Lightning's is the GPU, with another generator and no accelerate to load with."""
    expected = build_model(spec, seed=5).state_dict()
    with torch.device("meta"):
        found = build_model(spec, seed=5).state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
