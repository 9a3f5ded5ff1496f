"""Samples that share a row learn and answer as if each were alone, and do not see each other."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from tests.models.plain_attention import attend_inside_segments
from tests.models.tiny_batches import PAD, batch_of, three_samples
from vipllava.checkpoints.loading import build_model
from vipllava.models.building import ModelSpec
from vipllava.models.freezing import set_trainable
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT

NUM_LABELS = (4, 7, 2)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    # What transformers and torch themselves do for flex attention:
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]


def make_model(tiny_sources, language_model, attention, dtype="float32"):
    spec = ModelSpec(
        vision_tower=tiny_sources.vision_tower,
        language_model=getattr(tiny_sources, language_model),
        feature_layers=(-1, -2, 1),
        chat_template="llava_v1",
        image_size=28,
        dtype=dtype,
        attn_implementation=attention,
    )
    model = build_model(spec)
    set_trainable(model, ["projector", "language_model"])
    return model


@pytest.fixture(scope="module", params=["eager", "sdpa", "flex_attention", "torch_varlen"])
def attention(request):
    """Every implementation that runs on a CPU; the kernel of one is replaced."""
    if request.param == "torch_varlen":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vipllava.models.attention.load_kernel", lambda: attend_inside_segments)
            yield request.param
        return
    if request.param != "flex_attention":
        yield request.param
        return
    # Compiling it takes most of a minute. The mask, which is what matters here, stays the same.
    torch.compiler.set_stance("force_eager")
    yield request.param
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module", params=["language_model", "tied_language_model", "phi3"])
def model(request, tiny_sources, attention):
    return make_model(tiny_sources, request.param, attention)


@contextmanager
def training(model, mode):
    language_model = model.model.language_model
    if mode == "checkpointed":
        enable = (
            getattr(language_model, "activation_checkpointing_enable", None)
            or language_model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model.train(mode != "eval")
    yield
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    model.eval()


def layouts(samples):
    """Ways to put three samples into rows, some with several, in another order, with padding."""
    first, second, third = samples
    yield [[first, second, third]]
    yield [[first], [second, third]]
    yield [[third, first], [second]]


def learn(model, rows, key, *, backward=True):
    """One sample's mean loss in a batch and its gradients: the others' labels are ignored."""

    def masked(sample):
        if sample.key == key:
            return sample
        ignored = np.full_like(sample.encoded.labels, IGNORE_INDEX)
        return replace(sample, encoded=replace(sample.encoded, labels=ignored))

    device = next(model.parameters()).device
    batch = batch_of([[masked(sample) for sample in row] for row in rows]).to(device)
    model.zero_grad()
    with nullcontext() if backward else torch.no_grad():
        loss_sum, num_supervised = supervised_loss_sum(model, batch)
    if backward:
        loss_sum.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss_sum.detach() / num_supervised, gradients


def check_parity(model, *, backward=True, atol=1e-5, rtol=1e-4):
    samples = three_samples()
    for sample in samples:
        loss, gradients = learn(model, [[sample]], sample.key, backward=backward)
        assert bool(gradients) == backward
        for rows in layouts(samples):
            packed_loss, packed = learn(model, rows, sample.key, backward=backward)
            torch.testing.assert_close(packed_loss, loss, rtol=0, atol=atol)
            # A text-only sample alone gives the projector zeros; the blank picture sees to that.
            assert packed.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(packed[name], gradient, rtol=rtol, atol=atol)


def logits_of(model, batch, counts=NUM_LABELS):
    """The logits that make the loss, per sample: [supervised positions, vocabulary]."""
    found = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        supervised_loss_sum(model, batch.to(next(model.parameters()).device))
    hook.remove()
    (logits,) = found
    return logits.split(counts)


def largest(difference):
    return difference.abs().max().item()


def leak(model, *, positions_restart):
    """How far the last sample's logits move when both samples in front of it become others."""
    samples, others = three_samples(), three_samples(seed=1)
    answers = []
    for front in (samples[:2], others[:2]):
        batch = batch_of([[*front, samples[2]]])
        if not positions_restart:
            batch.position_ids = torch.arange(batch.input_ids.shape[1])[None]
        answers.append(logits_of(model, batch))
    before, after = answers
    assert all(largest(before[n] - after[n]) > 0.1 for n in (0, 1))  # they are others indeed
    return largest(before[2] - after[2])


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointed"])
def test_packed_samples_learn_as_if_alone(model, attention, mode):
    # torch has no backward pass of flex attention on a CPU.
    with training(model, mode):
        check_parity(model, backward=attention != "flex_attention")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_samples_do_not_see_those_in_front_of_them(model, mode):
    with training(model, mode):
        assert leak(model, positions_restart=True) <= 1e-6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_that_a_leak_would_be_found(model, mode):
    """Without restarts samples see each other, and the same measurement says so."""
    with training(model, mode):
        assert leak(model, positions_restart=False) > 0.01


def test_padding_and_other_rows_change_nothing(model):
    samples, others = three_samples(), three_samples(seed=1)
    plain = logits_of(model, batch_of([samples[:2], [samples[2]]]))
    other_row = logits_of(model, batch_of([samples[:2], [others[2]]]))
    batch = batch_of([samples[:2], [samples[2]]], padding=5)
    batch.input_ids[batch.segment_ids == PADDING_SEGMENT] = PAD - 100
    other_padding = logits_of(model, batch)
    for found, number in ((other_row, 0), (other_row, 1), *((other_padding, n) for n in range(3))):
        assert largest(found[number] - plain[number]) <= 1e-6


def test_flash_attention_is_told_where_samples_begin(tiny_sources):
    """In transformers it reads restarts in a batch of one row only; more rows leak without this."""
    told = []

    def by_bounds(module, query, key, value, attention_mask, scaling, **options):
        """What flash attention does with bounds, [rows, heads, length, size] of a causal model."""
        assert attention_mask is None
        bounds = options["cu_seq_lens_q"].tolist()
        assert bounds == options["cu_seq_lens_k"].tolist()
        longest = max(b - a for a, b in pairwise(bounds))
        # An upper bound that needs no waiting for the device: the rows' length.
        assert options["max_length_q"] == options["max_length_k"] >= longest
        told.append(bounds)
        heads = query.shape[1]
        columns = (
            x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1).flatten(1, 2)
            for x in (query, key, value)
        )
        parts = [
            functional.scaled_dot_product_attention(*part, is_causal=True, scale=scaling)
            for part in zip(*(x.split(np.diff(bounds).tolist(), 1) for x in columns), strict=True)
        ]
        whole = torch.cat(parts, dim=1).unflatten(1, (query.shape[0], query.shape[2]))
        return whole.permute(1, 2, 0, 3), None

    model = make_model(tiny_sources, "language_model", "eager")
    AttentionInterface.register("by_bounds", by_bounds)
    AttentionMaskInterface.register("by_bounds", flash_attention_mask)
    model.model.language_model.set_attn_implementation("by_bounds")
    check_parity(model)
    first, second, third = three_samples()
    told.clear()
    logits_of(model, batch_of([[first, second], [third]]))
    assert told[0] == [0, 17, 31, 33, 45, 66]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "attention", ["sdpa", "flex_attention", "flash_attention_2", "torch_varlen"]
)
@pytest.mark.parametrize("mode", ["train", "checkpointed"])
def test_on_a_gpu(tiny_sources, attention, mode):
    flash = attention in ("flash_attention_2", "torch_varlen")
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    # Flash attention computes in 16 bits only; a sample that saw another would be off by far more.
    dtype, tolerance = ("bfloat16", 0.05) if flash else ("float32", 1e-4)
    # Flex attention wants heads of at least 16.
    model = make_model(tiny_sources, "rows_of_64", attention, dtype).cuda()
    with training(model, mode):
        check_parity(model, atol=tolerance, rtol=tolerance)
        assert leak(model, positions_restart=True) <= tolerance / 10
        assert leak(model, positions_restart=False) > tolerance
