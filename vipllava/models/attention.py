"""PyTorch's own flash kernel for rows of several samples, as an attention of transformers.

With the segments' bounds among the keyword arguments that transformers hands through
(:func:`vipllava.models.supervised_loss.flash_bounds`) the kernel keeps samples apart and no mask is
made. Without them, as in generating with padding and a cache, ``sdpa`` does the work with the mask
that it needs, as always in the vision tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vipllava.config.attention import FALLBACK, TORCH_VARLEN
from vipllava.types import first_line

_TOLERANCE: Final = 0.05  # of the largest number: bf16 has three digits

Kernel: TypeAlias = Callable[..., torch.Tensor]
"""Causal attention inside segments that lie behind each other, as :func:`adapt_kernel` makes it."""


def attention_settings(name: str) -> str | dict[str, str]:
    """Return an implementation as transformers' ``attn_implementation`` takes it."""
    if name != TORCH_VARLEN:
        return name
    AttentionInterface.register(TORCH_VARLEN, partial(varlen_attention, load_kernel()))
    AttentionMaskInterface.register(TORCH_VARLEN, mask_for_sdpa)
    return {"": FALLBACK, "vision_config": FALLBACK, "text_config": TORCH_VARLEN}


def load_kernel() -> Kernel:
    """Return the installed PyTorch's kernel; it runs on CUDA devices only."""
    from torch.nn.attention.varlen import varlen_attn

    return adapt_kernel(varlen_attn)


def adapt_kernel(varlen_attn: Callable[..., Any]) -> Kernel:
    """Return ``torch.nn.attention.varlen``'s function behind one signature; releases differ.

    The kernel takes queries [tokens, heads, size], keys and values [tokens, key-value heads, size],
    ``bounds`` int32 [segments + 1], where segments begin and the last ends, and ``longest``, which
    no segment exceeds; ``scale`` None is 1 / sqrt(size); ``window`` is how many tokens a token
    sees, itself included, None for all before it. It returns [tokens, heads, size].
    """
    # 2.11 has no `enable_gqa` and wants as many key-value heads as heads.
    known = inspect.signature(varlen_attn).parameters

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        *,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        # To the left it counts the tokens beside the own one.
        left = -1 if window is None or window >= longest else window - 1
        return varlen_attn(
            query, key, value, bounds, bounds, longest, longest,
            scale=scale, window_size=(left, 0), **options,
        )  # fmt: skip

    return kernel


def find_kernel_problem(
    kernel: Kernel, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Compute a few segments forward and backward, and say what is wrong with them.

    What the kernel raised, or how far it is from ``sdpa``; None where it is right.
    """
    generator = torch.Generator().manual_seed(0)
    bounds, heads, groups, size = [0, 3, 40, 41, 168], 8, 2, 64
    shapes = [(bounds[-1], heads, size), *[(bounds[-1], groups, size)] * 2]
    *inputs, weight = (torch.randn(s, generator=generator) for s in (*shapes, shapes[0]))

    def learn(attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
        mixed = attend(*leaves)
        (mixed * weight.to(device, dtype)).sum().backward()
        return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        parts = [x.transpose(0, 1).float().tensor_split(bounds[1:-1], dim=1) for x in tensors]
        return torch.cat(list(map(attend, *parts)), dim=1).transpose(0, 1)

    try:
        places = torch.tensor(bounds, dtype=torch.int32, device=device)
        found = learn(partial(kernel, bounds=places, longest=bounds[-1], scale=None, window=None))
    except Exception as error:  # noqa: BLE001 - a kernel may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
    names = ("its values", "a query's gradient", "a key's gradient", "a value's gradient")
    for name, mine, wanted in zip(names, found, learn(plain), strict=True):
        difference = (mine.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not difference < _TOLERANCE:
            return f"{name} differ from those of sdpa by {float(difference):.2g} of the largest"
    return None


def varlen_attention(
    kernel: Kernel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Callable[[], torch.Tensor | None] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend inside the segments that ``cu_seq_lens_q`` bounds, as transformers calls an attention.

    From [rows, heads, length, size] to the mixed values, [rows, length, heads, size], and no
    scores. Without bounds, or with dropout of the scores, which the kernel has not, ``sdpa`` does
    it with what :func:`mask_for_sdpa` returned.
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or dropout:
        mask: Any = attention_mask() if callable(attention_mask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
        )
    rows, _, length, _ = query.shape
    # Rotated in float32 under autocast, which casts for PyTorch's own functions only.
    dtype = get_target_dtype(query, module) or query.dtype
    q, k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    longest = options["max_length_q"]
    mixed = kernel(q, k, v, bounds, longest, scale=scaling, window=sliding_window)
    return mixed.unflatten(0, (rows, length)), None


def mask_for_sdpa(**arguments: Any) -> Any:
    """Return the mask of ``sdpa``; for rows of several samples a promise of it.

    With bounds nobody asks for it, and at 8,192 tokens a row's mask has 67 million entries.
    """
    several = arguments.get("attention_mask") is None and not arguments["allow_is_causal_skip"]
    return partial(sdpa_mask, **arguments) if several else sdpa_mask(**arguments)
