"""Are two networks the same? Their logits on one fixed picture and text say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.image_features import normalise_pixels
from vipllava.models.towers import preprocessing_of
from vipllava.types import CheckpointError

NUM_WORDS = 48
"""Text ids of the probe, spread over the whole vocabulary."""
TOLERANCE = 1e-5
"""Greatest difference of logits, as a share of their spread, where weights are only copied.

Equal weights in one dtype on one device give equal logits whatever the dtype; what is left is the
order of sums, which can differ between runs on some devices.
"""
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The same where an adapter is added to the weights: those are rounded to their dtype again."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found.

    Attributes:
        difference: greatest absolute difference of two logits.
        spread: standard deviation of the expected logits.
        tolerance: greatest share of the spread that was allowed.
        num_logits: how many were compared.
    """

    difference: float
    spread: float
    tolerance: float
    num_logits: int

    @property
    def holds(self) -> bool:
        """Whether the two are the same."""
        return self.difference <= self.tolerance * max(self.spread, 1e-3)


@torch.inference_mode()
def probe_logits(model: VipLlavaForConditionalGeneration, num_rows: int) -> torch.Tensor:
    """Return the logits of a fixed picture and text.

    Args:
        model: on any device.
        num_rows: ids of the language model's own vocabulary; rows behind it are never targets and
            start differently in every format.

    Returns:
        float32 [positions, num_rows] on the CPU.
    """
    config: Any = model.config
    network: Any = model
    device = network.device
    image_token: int = config.image_token_id
    words = torch.linspace(3, num_rows - 1, NUM_WORDS).long()
    words[words == image_token] = 3
    image = torch.full((config.image_seq_length,), image_token, dtype=torch.long)
    ids = torch.cat([words[:8], image, words[8:]])[None]
    side: int = config.vision_config.image_size
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None]
    pixels = torch.stack([(rows * 7 + columns * 13 * (c + 1) + c * 29) % 256 for c in range(3)])
    normalised = normalise_pixels(
        pixels.to(torch.uint8)[None].to(device),
        network.dtype,
        preprocessing_of(config.vision_config),
    )
    logits = network(
        input_ids=ids.to(device), pixel_values=normalised, use_cache=False, logits_to_keep=0
    ).logits
    return logits[0, :, :num_rows].float().cpu()


def compare(
    expected: torch.Tensor, found: torch.Tensor, *, dtype: torch.dtype, merged: bool = False
) -> Agreement:
    """Compare two results of :func:`probe_logits`.

    Args:
        expected: of the source.
        found: of what was written.
        dtype: both were computed in.
        merged: an adapter was merged on the way.
    """
    tolerance = MERGED_TOLERANCE[dtype] if merged else TOLERANCE
    if expected.shape != found.shape or not torch.isfinite(found).all():
        return Agreement(float("inf"), 0.0, tolerance, found.numel())
    difference = float((expected - found).abs().max())
    return Agreement(difference, float(expected.std()), tolerance, found.numel())


def insist(agreement: Agreement, what: str) -> None:
    """Raise unless the two are the same.

    Raises:
        CheckpointError: naming the difference.
    """
    if not agreement.holds:
        raise CheckpointError(
            f"{what} gives other answers than its source: logits differ by "
            f"{agreement.difference:.3g} (spread {agreement.spread:.3g}, allowed share "
            f"{agreement.tolerance:g}); it was not kept. This is a defect: please report the "
            "command with the source's config.json"
        )
