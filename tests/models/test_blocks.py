"""Recomputing and compiling decoder blocks changes what is kept and how fast, and no number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.tiny_batches import batch_of, three_samples
from vipllava.checkpoints.loading import build_model
from vipllava.models.blocks import (
    compile_blocks,
    decoder_blocks,
    recompute_blocks,
    train_recomputed,
)
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import hold_frozen, set_trainable
from vipllava.models.supervised_loss import supervised_loss_sum

# The compiler looks at everything that a tensor has.
TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
PARTS = ["projector", "language_model"]


@pytest.fixture
def make(tiny_sources):
    def make(trainable=PARTS, attention="sdpa"):
        model = build_model(
            ModelSpec(
                vision_tower=tiny_sources.vision_tower,
                language_model=tiny_sources.language_model,  # two blocks
                feature_layers=(-1, -2, 1),
                chat_template="llava_v1",
                image_size=28,
                attn_implementation=attention,
            )
        )
        set_trainable(model, trainable)
        return model

    return make


def learn(model):
    """Loss and gradients of two rows, the second of two samples."""
    first, second, third = three_samples()
    loss, _ = supervised_loss_sum(model, batch_of([[first], [second, third]]))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize(("count", "forwards"), [(None, [2, 2]), (0, [1, 1]), (1, [2, 1])])
def test_the_first_blocks_are_computed_twice(make, count, forwards):
    expected_loss, expected = learn(make())
    model = make()
    recompute_blocks(model, count)
    train_recomputed(model)
    calls = [0, 0]
    for number, block in enumerate(decoder_blocks(model)):

        def count_call(*_, number=number):
            calls[number] += 1

        block.self_attn.register_forward_pre_hook(count_call)

    loss, gradients = learn(model)

    assert calls == forwards
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_only_the_blocks_themselves_are_put_in_train_mode(make):
    model = make().eval()
    train_recomputed(model)

    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"model.language_model.layers.0", "model.language_model.layers.1"}


@pytest.mark.parametrize("recomputed", [0, 1, None])
@TRACING
def test_compiled_blocks_learn_the_same(make, recomputed):
    """By the compiler's front, which traces; generating code takes minutes on a CPU."""
    expected_loss, expected = learn(make())
    model = make()
    recompute_blocks(model, recomputed)
    train_recomputed(model)
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, backend="aot_eager")

    loss, gradients = learn(model)

    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@TRACING
def test_compiled_code_is_shared_by_the_blocks(make):
    """Otherwise the compiler would give up at the eighth of 32 blocks, without an error."""
    model = make()
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=compiled)

    learn(model)

    assert compiled.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_frozen_is_held_in_half_precision(make, dtype):
    model = make(["projector"])
    hold_frozen(model, dtype)

    projector = list(model.model.multi_modal_projector.parameters())
    assert {p.dtype for p in projector} == {torch.float32}
    others = {id(p) for p in model.parameters()} - {id(p) for p in projector}
    assert {p.dtype for p in model.parameters() if id(p) in others} == {dtype}
    assert isinstance(model.lm_head.weight, nn.Parameter)


def test_frozen_halves_learn_what_autocast_does(make):
    """The projector's gradients, against float32 weights that every product casts."""
    gradients = []
    for hold in (False, True):
        model = make(["projector"])
        if hold:
            hold_frozen(model, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = supervised_loss_sum(model, batch_of([[s] for s in three_samples()]))
        loss.backward()
        weight = model.model.multi_modal_projector.linear_2.weight
        assert weight.grad.dtype == torch.float32
        gradients.append(weight.grad.flatten())

    alike = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert alike > 0.999
