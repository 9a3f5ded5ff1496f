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
    """Have the first ``count`` decoder blocks computed again in the backward pass.

    What they would keep for it is given up, which is most of a step's memory; the rest keep
    theirs. The first ones, because their turn in the backward pass comes last: by then the others
    have let go of what they kept.

    Recomputing changes no number. It happens in train mode only, see :func:`train_recomputed`.

    Args:
        model: the network.
        count: how many; None: all.
    """
    language_model: Any = model.model.language_model
    # transformers renames the method from 5.18 on and warns about the old name.
    enable = getattr(
        language_model,
        "activation_checkpointing_enable",
        getattr(language_model, "gradient_checkpointing_enable", None),
    )
    assert enable is not None
    # Reentrant checkpointing needs an input that asks for a gradient, and frozen embeddings of a
    # text-only batch do not.
    enable({"use_reentrant": False})
    for number, block in enumerate(decoder_blocks(model)):
        block.gradient_checkpointing = count is None or number < count


def train_recomputed(model: VipLlavaForConditionalGeneration) -> None:
    """Put the decoder blocks themselves, and nothing inside them, in train mode.

    transformers recomputes a block only while the block is in train mode. Its attention and MLP
    stay as they are, so a frozen model has no dropout.
    """
    for block in decoder_blocks(model):
        block.training = True


def compile_blocks(
    model: VipLlavaForConditionalGeneration, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each decoder block by itself; they are alike, so the code is made once.

    The whole network would be compiled anew for every number of pictures and of supervised
    positions; what a block sees changes with the rows' length only.

    Args:
        model: the network; its weights keep their names.
        backend: as ``torch.compile`` takes it.
    """
    for block in decoder_blocks(model):
        block.compile(backend=backend)
