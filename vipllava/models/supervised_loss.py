"""The loss of a micro-batch: cross entropy summed over its supervised positions, and only those.

Two choices differ from ``VipLlavaForConditionalGeneration.forward`` and give the same numbers:

* The head runs on the supervised positions only. In stage 1 these are about 25 of 600 tokens, so
  most of the logits would be thrown away.
* Rows are kept apart by ``position_ids`` that restart with every segment; there is no attention
  mask and no cache. transformers builds the block mask only in that combination: an all-ones
  mask or ``use_cache=True`` makes packed samples see each other without any error. Flash attention
  reads restarts only in a batch of one row; in any other it sees them by the segments' bounds,
  which are given along.

The sum is not divided here: the right denominator is the count over all ranks and accumulation
steps, and the caller has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.image_features import image_features
from vipllava.types import IGNORE_INDEX, Batch, VipLlavaError


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the network said at the supervised positions of a micro-batch; no graph.

    Attributes:
        supervised: bool [rows, length - 1]; position ``i`` predicts the id at ``i + 1``.
        logits: float32 [num_supervised, vocabulary].
        targets: int64 [num_supervised].
        loss_sum: float32 scalar, the summed cross entropy.
    """

    supervised: torch.Tensor
    logits: torch.Tensor
    targets: torch.Tensor
    loss_sum: torch.Tensor


class Observer(Protocol):
    """Looks at the predictions of a micro-batch; must change nothing and call no collective."""

    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Take from a micro-batch what is of interest."""
        ...


def embed_inputs(
    model: VipLlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    *,
    always_run_tower: bool = False,
    keys: tuple[str, ...] = (),
) -> torch.Tensor:
    """Embed the ids and put the image features at the image tokens, in row order.

    Args:
        model: the network.
        input_ids: int64 [rows, length].
        pixel_values: uint8 [num_images, 3, height, width]; may hold no image.
        always_run_tower: without an image, run tower and projector on a blank one and add its
            features with weight zero. In training every rank must call the same modules: with
            ZeRO-3 and FSDP each call is a collective, and a rank whose batch is all text would
            leave the others waiting for ever. The gradient of the projector then is zero, not
            absent, which keeps DDP content, too.
        keys: the samples, for the error.

    Returns:
        [rows, length, hidden].

    Raises:
        VipLlavaError: image tokens and image features differ in number.
    """
    config: Any = model.config
    embeddings = model.get_input_embeddings()(input_ids)
    placeholders = input_ids == config.image_token_id
    num_images = pixel_values.shape[0]
    num_expected = num_images * config.image_seq_length
    num_placeholders = int(placeholders.sum())
    if num_placeholders != num_expected:
        raise VipLlavaError(
            f"{num_placeholders} image tokens, but {num_expected} image features ({num_images} "
            f"pictures x {config.image_seq_length}) in samples {list(keys)}: the data was "
            "encoded for a model of another image_seq_length"
        )
    if num_images:
        features = image_features(model, pixel_values).to(embeddings.dtype)
        return embeddings.masked_scatter(placeholders.unsqueeze(-1), features)
    if not always_run_tower:
        return embeddings
    side = config.vision_config.image_size
    blank = torch.zeros((1, 3, side, side), dtype=torch.uint8, device=input_ids.device)
    return embeddings + 0.0 * image_features(model, blank).sum().to(embeddings.dtype)


def flash_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return the segments' bounds as flash attention wants them; the others ignore them.

    Args:
        position_ids: int64 [rows, length]; each 0 begins a segment, and each row begins with one.

    Returns:
        Keyword arguments of transformers' language models; the bounds count through all rows.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    # No segment is longer than a row. The longest one's own length would have to be waited for, and
    # compiled code be made anew for each.
    longest = position_ids.shape[1]
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def supervised_positions(batch: Batch) -> torch.Tensor:
    """Return where something is to be predicted; nothing waits for the device.

    A position predicts the next id where that one's label is supervised and belongs to the same
    segment; the first id of a segment has nothing to be predicted from.

    Args:
        batch: padded or packed rows.

    Returns:
        bool [rows, length - 1]; position ``i`` predicts the id at ``i + 1``.
    """
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return (batch.labels[:, 1:] != IGNORE_INDEX) & same


def supervised_loss_sum(
    model: VipLlavaForConditionalGeneration, batch: Batch, observers: Sequence[Observer] = ()
) -> tuple[torch.Tensor, int]:
    """Return the summed cross entropy of a micro-batch and the number of its terms.

    Its terms are :func:`supervised_positions`.

    Args:
        model: the network.
        batch: the micro-batch, on the model's device.
        observers: see the logits, which exist nowhere else.

    Returns:
        The sum as a float32 scalar with a graph (0 for a batch without supervised positions,
        still connected to every trainable weight), and the count.

    Raises:
        VipLlavaError: image tokens and pictures do not match.
    """
    embeddings = embed_inputs(
        model, batch.input_ids, batch.pixel_values, always_run_tower=True, keys=batch.keys
    )
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=None,
        position_ids=batch.position_ids,
        use_cache=False,
        **flash_bounds(batch.position_ids),
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    supervised = supervised_positions(batch)
    logits = model.lm_head(hidden[:, :-1][supervised])
    logits, targets = logits.float(), targets[supervised]
    loss_sum = functional.cross_entropy(logits, targets, reduction="sum")
    if observers:
        predictions = Predictions(supervised, logits.detach(), targets, loss_sum.detach())
        for observer in observers:
            observer.observe(batch, predictions)
    return loss_sum, int(logits.shape[0])
