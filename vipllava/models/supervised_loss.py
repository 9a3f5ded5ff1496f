"""The loss of a micro-batch: cross entropy summed over its supervised positions, and only those.

Two choices differ from ``VipLlavaForConditionalGeneration.forward`` and give the same numbers:

* The head runs on the supervised positions only: in stage 1 about 25 of 600 tokens.
* Rows are kept apart by ``position_ids`` that restart with every segment, without attention mask
  and cache: an all-ones mask or ``use_cache=True`` makes packed samples see each other without any
  error. Flash attention sees the segments by their bounds, which are given along.

The sum is not divided here: the denominator is the count over all ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import VipLlavaForConditionalGeneration

from vipllava.models.towers import image_features
from vipllava.types import IGNORE_INDEX, Batch, VipLlavaError


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the network said at the supervised positions of a micro-batch; no graph."""

    supervised: torch.Tensor  # see :func:`supervised_positions`
    logits: torch.Tensor  # float32 [num_supervised, vocabulary]
    targets: torch.Tensor  # int64 [num_supervised]
    loss_sum: torch.Tensor  # float32 scalar, the summed cross entropy


class Observer(Protocol):
    """Looks at the predictions of a micro-batch; must change nothing and call no collective."""

    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Take from a micro-batch what is of interest."""
        ...


def embed_inputs(model: VipLlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Embed the ids and put the image features at the image tokens, in row order.

    Without an image tower and projector run on a blank one, whose features get weight zero: every
    rank must call the same modules, which are collectives with ZeRO-3 and FSDP, and DDP waits for
    every gradient. It returns [rows, length, hidden].

    Raises:
        VipLlavaError: image tokens and image features differ in number.
    """
    config: Any = model.config
    embeddings = model.get_input_embeddings()(batch.input_ids)
    placeholders = batch.input_ids == config.image_token_id
    num_images, each = len(batch.pixel_values), config.image_seq_length
    if (found := int(placeholders.sum())) != num_images * each:
        raise VipLlavaError(
            f"{found} image tokens, but {num_images * each} image features ({num_images} images x "
            f"{each}) in samples {list(batch.keys)}: the data was encoded for a model of another "
            "image_seq_length"
        )
    if num_images:
        features = image_features(model, batch.pixel_values).to(embeddings.dtype)
        return embeddings.masked_scatter(placeholders.unsqueeze(-1), features)
    side = config.vision_config.image_size
    blank = torch.zeros((1, 3, side, side), dtype=torch.uint8, device=embeddings.device)
    return embeddings + 0.0 * image_features(model, blank).sum().to(embeddings.dtype)


def flash_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return the segments' bounds as flash attention wants them; the others ignore them.

    Keyword arguments of transformers' language models; bounds count through all rows. Each 0 of the
    ids, [rows, length], begins a segment, and each row begins with one.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    # No segment is longer than a row. The longest one's own length would have to be waited for, and
    # compiled code be made anew for each.
    longest = {"max_length_q": position_ids.shape[1], "max_length_k": position_ids.shape[1]}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **longest}


def supervised_positions(batch: Batch) -> torch.Tensor:
    """Return where something is to be predicted; nothing waits for the device.

    bool [rows, length - 1]: position ``i`` predicts the id at ``i + 1`` where that one's label is
    supervised and belongs to the same segment.
    """
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return (batch.labels[:, 1:] != IGNORE_INDEX) & same


def supervised_loss_sum(
    model: VipLlavaForConditionalGeneration, batch: Batch, observers: Sequence[Observer] = ()
) -> tuple[torch.Tensor, int]:
    """Return the summed cross entropy at :func:`supervised_positions`, and their number.

    The sum is a float32 scalar with a graph to every trainable weight, also where it is 0. The
    observers see the logits, which exist nowhere else. The batch is on the model's device.

    Raises:
        VipLlavaError: image tokens and pictures do not match.
    """
    hidden = model.model.language_model(
        inputs_embeds=embed_inputs(model, batch),
        attention_mask=None,
        position_ids=batch.position_ids,
        use_cache=False,
        **flash_bounds(batch.position_ids),
    ).last_hidden_state
    supervised = supervised_positions(batch)
    logits = model.lm_head(hidden[:, :-1][supervised]).float()
    targets = batch.labels[:, 1:][supervised]
    loss_sum = functional.cross_entropy(logits, targets, reduction="sum")
    if observers:
        predictions = Predictions(supervised, logits.detach(), targets, loss_sum.detach())
        for observer in observers:
            observer.observe(batch, predictions)
    return loss_sum, int(logits.shape[0])
