"""The decoder blocks of the language model: which are recomputed, and whether they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import VipLlavaForConditionalGeneration

from vipllava.models.adapters import BLOCKS


def decoder_blocks(model: VipLlavaForConditionalGeneration) -> list[Any]:
    """Return the decoder blocks in order."""
    return list(model.get_submodule(BLOCKS).children())


def recompute_blocks(model: VipLlavaForConditionalGeneration, count: int | None = None) -> None:
    """Have the first ``count`` decoder blocks (None: all) computed again in the backward pass.

    Most of a step's memory is what they would keep for it. The first ones, because their turn in
    the backward pass comes last: by then the others have let go of what they kept. It changes no
    number and happens in train mode only, see :func:`train_recomputed`.
    """
    language_model: Any = model.model.language_model
    # transformers renames the method from 5.18 on and warns about the old name.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    enable = getattr(language_model, new if hasattr(language_model, new) else old)
    # Reentrant checkpointing needs an input that asks for a gradient, and frozen embeddings of a
    # text-only batch do not.
    enable({"use_reentrant": False})
    for number, block in enumerate(decoder_blocks(model)):
        block.gradient_checkpointing = count is None or number < count


def train_recomputed(model: VipLlavaForConditionalGeneration) -> None:
    """Put the decoder blocks in train mode, where alone transformers recomputes them.

    Nothing inside them changes its mode, so a frozen model has no dropout.
    """
    for block in decoder_blocks(model):
        block.training = True


def compile_blocks(
    model: VipLlavaForConditionalGeneration, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each decoder block by itself; they are alike, so the code is made once.

    The whole network would be compiled anew for every number of images and of supervised
    positions; what a block sees changes with the rows' length only.
    """
    for block in decoder_blocks(model):
        block.compile(backend=backend)
