"""PyTorch's kernel for rows of several samples: as sdpa where it has bounds, sdpa where not."""

from __future__ import annotations

import pytest
import torch

from tests.models.plain_attention import attend_inside_segments
from tests.models.test_packed_parity import largest, logits_of, make_model
from tests.models.tiny_batches import batch_of, three_samples
from vipllava.models import attention
from vipllava.models.supervised_loss import supervised_loss_sum


class CountedKernel:
    """The plain one, which remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, bounds, longest, *, scale, window):
        self.calls.append((tuple(query.shape), tuple(key.shape), bounds.tolist(), longest, window))
        return attend_inside_segments(
            query, key, value, bounds, longest, scale=scale, window=window
        )


@pytest.fixture
def kernel(monkeypatch):
    kernel = CountedKernel()
    monkeypatch.setattr(attention, "load_kernel", lambda: kernel)
    return kernel


@pytest.mark.parametrize("language_model", ["language_model", "phi3", "mistral"])
def test_packed_rows_have_the_logits_of_sdpa(tiny_sources, kernel, language_model):
    first, second, third = three_samples()
    batch = batch_of([[first, second], [third]])
    expected = logits_of(make_model(tiny_sources, language_model, "sdpa"), batch)
    model = make_model(tiny_sources, language_model, "torch_varlen")
    for found, wanted in zip(logits_of(model, batch), expected, strict=True):
        assert largest(found - wanted) <= 1e-5
    # Each block once; two rows of 33 tokens, grouped keys as they are.
    heads = 4 if language_model == "phi3" else 2
    segments = [0, 17, 31, 33, 45, 66]
    assert len(kernel.calls) == model.config.text_config.num_hidden_layers
    assert {str(call[:4]) for call in kernel.calls} == {
        str(((66, 4, 8), (66, heads, 8), segments, 33))
    }


def test_a_sliding_window_is_that_of_sdpa(tiny_sources, kernel):
    batch = batch_of([three_samples()])
    answers = []
    for name in ("sdpa", "torch_varlen"):
        model = make_model(tiny_sources, "mistral", name)
        model.config.text_config.sliding_window = 3
        answers.append(torch.cat(logits_of(model, batch)))
    assert [call[4] for call in kernel.calls] == [3] * len(kernel.calls) != []
    assert largest(answers[1] - answers[0]) <= 1e-5
    model.config.text_config.sliding_window = None
    assert largest(torch.cat(logits_of(model, batch)) - answers[0]) > 0.01


def test_no_mask_is_made_where_there_are_bounds(tiny_sources, kernel, monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a mask of the whole row was made")

    model = make_model(tiny_sources, "language_model", "torch_varlen")
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    supervised_loss_sum(model, batch_of([three_samples()]))
    assert kernel.calls


def test_tower_and_whole_have_sdpa(tiny_sources, kernel):
    model = make_model(tiny_sources, "language_model", "torch_varlen")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "torch_varlen"
    assert model.config._attn_implementation == "sdpa"


def test_without_bounds_packed_samples_are_still_kept_apart(tiny_sources, kernel):
    batch = batch_of([three_samples()])
    hidden = []
    for name in ("sdpa", "torch_varlen"):
        model = make_model(tiny_sources, "language_model", name)
        with torch.no_grad():
            output = model.model.language_model(
                input_ids=batch.input_ids.clamp(max=255),
                position_ids=batch.position_ids,
                use_cache=False,
            )
        hidden.append(output.last_hidden_state)
    assert not kernel.calls
    torch.testing.assert_close(hidden[1], hidden[0])


def test_generating_with_padding_and_a_cache_is_that_of_sdpa(tiny_sources, kernel):
    ids = torch.tensor([[260, 260, 1, 40, 41, 42], [1, 50, 51, 52, 53, 54]])
    answers = []
    for name in ("sdpa", "torch_varlen"):
        model = make_model(tiny_sources, "language_model", name)
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=(ids != 260).long(),
                max_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    assert not kernel.calls
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    torch.testing.assert_close(answers[0].logits, answers[1].logits)


def test_dropout_of_the_scores_is_left_to_sdpa(tiny_sources, kernel):
    model = make_model(tiny_sources, "language_model", "torch_varlen").train()
    for block in model.model.language_model.layers:
        block.self_attn.attention_dropout = 0.5
    batch = batch_of([three_samples()])
    supervised_loss_sum(model, batch)
    assert not kernel.calls
    supervised_loss_sum(model.eval(), batch)
    assert kernel.calls


def test_autocast_is_followed(tiny_sources, monkeypatch):
    """Queries and keys are float32 after their rotation; the kernel takes 16 bits only."""
    dtypes = set()

    def kernel(query, key, value, *bounds, **options):
        dtypes.update((query.dtype, key.dtype, value.dtype))
        return attend_inside_segments(query, key, value, *bounds, **options)

    monkeypatch.setattr(attention, "load_kernel", lambda: kernel)
    model = make_model(tiny_sources, "language_model", "torch_varlen")
    with torch.autocast("cpu", torch.bfloat16):
        supervised_loss_sum(model, batch_of([three_samples()]))
    assert dtypes == {torch.bfloat16}


def call_kernel(varlen_attn, *, window=None):
    query, key = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    attention.adapt_kernel(varlen_attn)(query, key, key, bounds, 4, scale=0.5, window=window)


@pytest.mark.parametrize(
    ("window", "expected"), [(None, (-1, 0)), (9, (-1, 0)), (4, (-1, 0)), (3, (2, 0)), (1, (0, 0))]
)
def test_how_a_newer_torch_is_called(window, expected):
    """2.12 and later; the installed one has these parameters, too."""
    seen = []

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        seen.append((key.shape[1], max_q, max_k, scale, window_size, enable_gqa))

    call_kernel(varlen_attn, window=window)
    assert seen == [(2, 4, 4, 0.5, expected, True)]


def test_how_torch_2_11_is_called():
    """It knows no grouped keys: each is there for all of its heads."""
    seen = []

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1),
    ):  # fmt: skip
        seen.append((key.shape[1], value.shape[1], scale, window_size))

    call_kernel(varlen_attn)
    assert seen == [(4, 4, 0.5, (-1, 0))]


def test_the_installed_torch_takes_the_call():
    """On meta tensors: names and shapes fit, no device is needed."""
    kernel = attention.load_kernel()
    with torch.device("meta"):
        shapes = ((6, 4, 8), (6, 2, 8), (6, 2, 8))
        tensors = [torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        bounds = torch.zeros(3, dtype=torch.int32)
        mixed = kernel(*tensors, bounds, 4, scale=None, window=3)
        mixed.backward(torch.zeros_like(mixed))
    assert (mixed.shape, mixed.dtype) == ((6, 4, 8), torch.bfloat16)
    assert [x.grad.shape for x in tensors if x.grad is not None] == list(shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_real_kernel_computes_the_plain_one(heads, window):
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 4, 16), (40, heads, 16), (40, heads, 16))
    plain = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    real = [x.detach().cuda().bfloat16().requires_grad_() for x in plain]
    bounds = torch.tensor([0, 3, 27, 28, 40], dtype=torch.int32)
    wanted = attend_inside_segments(*plain, bounds, 24, scale=0.3, window=window)
    found = attention.load_kernel()(*real, bounds.cuda(), 24, scale=0.3, window=window)
    weights = torch.randn(wanted.shape, generator=generator)
    (wanted * weights).sum().backward()
    (found.float() * weights.cuda()).sum().backward()
    torch.testing.assert_close(found.float().cpu(), wanted, atol=0.03, rtol=0.03)
    for a, b in zip(real, plain, strict=True):
        torch.testing.assert_close(a.grad.float().cpu(), b.grad, atol=0.1, rtol=0.05)


def test_a_right_kernel_has_no_problem():
    device = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        assert attention.find_kernel_problem(attend_inside_segments, device, dtype) is None


def test_a_kernel_that_cannot_run_is_found():
    problem = attention.find_kernel_problem(attention.load_kernel(), torch.device("cpu"))
    assert problem is not None  # it runs on CUDA devices only
    assert "Error: " in problem


@pytest.mark.parametrize("fault", ["bounds", "causal", "gradient"])
def test_a_wrong_kernel_is_found(fault):
    def kernel(query, key, value, bounds, longest, *, scale, window):
        if fault == "bounds":
            bounds = bounds[[0, -1]]
        if fault == "causal":
            key, value = key.flip(0), value.flip(0)
        mixed = attend_inside_segments(
            query, key, value, bounds, longest, scale=scale, window=window
        )
        return mixed if fault != "gradient" else mixed + 0.5 * (query - query.detach())

    problem = attention.find_kernel_problem(kernel, torch.device("cpu"), torch.float32)
    expected = "a query's gradient differ" if fault == "gradient" else "its values differ"
    assert problem is not None
    assert problem.startswith(expected)
