"""Are two networks the same? Their logits on one fixed picture and text say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.image_features import normalise_pixels
from vipllava.models.towers import preprocessing_of
from vipllava.types import CheckpointError

TOLERANCE = 1e-5
"""Greatest difference of logits, as a share of their spread, where weights are only copied: the
order of sums can differ between runs on some devices."""
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The same where an adapter is added to the weights: those are rounded to their dtype again."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found."""

    difference: float  # greatest absolute difference of two logits
    spread: float  # standard deviation of the expected logits
    num_logits: int  # how many were compared


@torch.inference_mode()
def probe_logits(model: VipLlavaForConditionalGeneration, num_rows: int) -> torch.Tensor:
    """Return the logits of a fixed picture and text, float32 [positions, num_rows] on the CPU.

    Args:
        model: on any device.
        num_rows: ids of the language model's own vocabulary; rows behind it are never targets and
            start differently in every format.
    """
    network: Any = model
    config, device = network.config, network.device
    image_token: int = config.image_token_id
    words = torch.linspace(3, num_rows - 1, 48).long()
    words[words == image_token] = 3
    image = torch.full((config.image_seq_length,), image_token, dtype=torch.long)
    ids = torch.cat([words[:8], image, words[8:]])[None]
    side: int = config.vision_config.image_size
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None]
    pixels = torch.stack([(rows * 7 + columns * 13 * (c + 1) + c * 29) % 256 for c in range(3)])
    pixels = pixels.to(torch.uint8)[None].to(device)
    normalised = normalise_pixels(pixels, network.dtype, preprocessing_of(config.vision_config))
    out = network(
        input_ids=ids.to(device), pixel_values=normalised, use_cache=False, logits_to_keep=0
    )
    return out.logits[0, :, :num_rows].float().cpu()


def compare(
    expected: torch.Tensor, found: torch.Tensor, what: str, *, dtype: torch.dtype, merged: bool
) -> Agreement:
    """Insist that two results of :func:`probe_logits` are the same.

    Args:
        expected: of the source.
        found: of what was written.
        what: was written, for the message.
        dtype: both were computed in.
        merged: an adapter was added to weights on the way, which rounds them again.

    Raises:
        CheckpointError: they are not; names the difference.
    """
    tolerance = MERGED_TOLERANCE[dtype] if merged else TOLERANCE
    difference = spread = float("inf")
    if expected.shape == found.shape and torch.isfinite(found).all():
        difference, spread = float((expected - found).abs().max()), float(expected.std())
        if difference <= tolerance * max(spread, 1e-3):
            return Agreement(difference, spread, found.numel())
    raise CheckpointError(
        f"{what} gives other answers than its source: logits differ by {difference:.3g} (spread "
        f"{spread:.3g}, allowed share {tolerance:g}); it was not kept. This is a defect: please "
        "report the command with the source's config.json"
    )
