"""Answers that run together: rows join a batch, and leave it as soon as they end.

::

    Prompt --Engine.row--> Row --join (prefill)--> slots --step--> a token a row --> text
                                                     ^________________|

A long answer never holds short ones: what ends gives its slot to what waits. A row reads its own
slot and draws from its own generator, so its answer does not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from vipllava.conversation.pieces import Before
from vipllava.inference.answer_text import AnswerText, Detokenizer
from vipllava.inference.choosing import choose, generator_of
from vipllava.inference.features import ImageFeatures, Picture
from vipllava.inference.kv_slots import KVSlots
from vipllava.inference.protocol import FinishReason, Sampling, TokenLogprob, Usage
from vipllava.types import VipLlavaError, first_line

logger = logging.getLogger(__name__)

_MULTIPLE: Final = 8  # of the columns a step looks at: kernels want aligned masks


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One question as the network reads it."""

    key: str
    ids: Sequence[int]  # those of the image included
    picture: Picture | None
    sampling: Sampling
    before: Before  # what stands before the answer


class Row:
    """One answer that runs.

    Attributes:
        prompt: what it answers.
        generated: its ids so far, the one that ended it included.
        finish_reason: once it has ended.
        error: with ``error`` as finish reason.
    """

    def __init__(
        self,
        prompt: Prompt,
        detokenizer: Detokenizer,
        stop_ids: frozenset[int],
        stops: tuple[str, ...],
        streams: bool,
    ) -> None:
        self.prompt = prompt
        self.generated: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: VipLlavaError | None = None
        self.draws = generator_of(prompt.sampling)
        self.token_text = detokenizer.token_text
        self._stop_ids, self._limit = stop_ids, prompt.sampling.max_new_tokens
        self._text = AnswerText(detokenizer, prompt.before, stops, streams)

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token, and end where that ends the answer."""
        self.generated.append(token)
        try:
            if token in self._stop_ids or self._text.add(token, logprob):
                self.end("stop")
            elif len(self.generated) >= self._limit:
                self.end("length")
        except Exception as defect:  # noqa: BLE001  # of this text alone; logged there
            self.fail(defect)

    def end(self, reason: FinishReason, error: VipLlavaError | None = None) -> None:
        """Take it that no token follows."""
        self._text.finish()
        if self._text.met_stop and reason == "length":
            reason = "stop"
        self.finish_reason, self.error = reason, error

    def fail(self, defect: Exception) -> None:
        """Take it that a defect ended this answer; the others go on."""
        logger.error("request %r failed", self.prompt.key, exc_info=defect)
        said = f"{type(defect).__name__}: {first_line(defect)}"
        self.finish_reason = "error"
        self.error = VipLlavaError(f"request {self.prompt.key!r} cannot be answered ({said})")

    def take(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Return the text, and its tokens' log probabilities, that is new since the last time."""
        return self._text.take()

    @property
    def num_context(self) -> int:
        """Ids that a prefill of this row reads."""
        return len(self.prompt.ids) + len(self.generated)

    @property
    def num_at_most(self) -> int:
        """Columns that its slot has when its answer is as long as it may be."""
        return len(self.prompt.ids) + self._limit

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""
        return Usage(len(self.prompt.ids), len(self.generated))


class Decoding:
    """The batch.

    Args:
        model: a VipLlava, on its device or devices.
        features: of images.
        device: that the network's inputs go to.
    """

    def __init__(self, model: Any, features: ImageFeatures, device: torch.device) -> None:
        self._device = device
        config = model.config.text_config
        self._language_model, self._lm_head = model.model.language_model, model.lm_head
        self._embed = model.get_input_embeddings()
        self._image_token_id: int = model.config.image_token_id
        self._implementation: str = config._attn_implementation
        self._features = features
        self._slots = KVSlots(config, config.max_position_embeddings)
        self._lengths: list[int] = []  # columns of each row; its newest token has none yet
        self.rows: list[Row] = []  # in slots of these numbers

    @property
    def num_columns(self) -> int:
        """Columns that every slot has room for."""
        return self._slots.num_columns

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Read prompts, and give each its first token; return the rows.

        Rows that left before they ended go on where they were. After an error none has joined.
        """
        lengths = [row.num_context for row in rows]
        try:
            logits = self._prefill(rows, lengths)
        except BaseException:
            if not self.rows:  # fewer rows begin anew, where memory was short
                self._slots.drop()
            raise
        self.rows += rows
        self._lengths += lengths
        self._push(rows, logits)
        return list(rows)

    def _prefill(self, rows: Sequence[Row], lengths: list[int]) -> torch.Tensor:
        """Read rows of so many ids into the slots behind those in use; return their logits."""
        first = len(self.rows)
        needed = 1 + max([*lengths, *self._lengths])
        self._slots.reserve(first + len(rows), needed, shrinks=True)
        embeds = self.embeds(rows, max(lengths))
        self._slots.begin_prefill(first)
        hidden = self._language_model(
            inputs_embeds=embeds, past_key_values=self._slots, use_cache=True
        ).last_hidden_state
        # Padding stands behind the prompts, where a causal network does not see it.
        places = torch.tensor(lengths, device=hidden.device) - 1
        last = hidden[torch.arange(len(rows), device=hidden.device), places]
        return self._lm_head(last).float()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Give every row one token more; return the rows, of which some may have left."""
        rows, needed = list(self.rows), 1 + max(self._lengths)
        self._slots.reserve(len(rows), needed)
        columns = -(-needed // _MULTIPLE) * _MULTIPLE
        newest = [row.generated[-1] for row in rows]
        tokens, positions = torch.tensor([newest, self._lengths], device=self._device)
        embeds = self._embed(tokens[:, None])
        self._slots.begin_step(positions, columns)
        hidden = self._language_model(
            inputs_embeds=embeds,
            attention_mask=self._masks(positions, columns, embeds.dtype),
            position_ids=positions[:, None],
            past_key_values=self._slots,
            use_cache=True,
        ).last_hidden_state
        logits = self._lm_head(hidden[:, -1]).float()
        self._lengths = [length + 1 for length in self._lengths]
        self._push(rows, logits)
        return rows

    @torch.inference_mode()
    def leave(self, gone: Collection[Row]) -> None:
        """Free the slots of these rows; who is in the last ones takes them."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row not in gone:
                continue
            if row.finish_reason == "error":
                self._slots.wipe(slot)
            last, length = self.rows.pop(), self._lengths.pop()
            if last is not row:
                self._slots.move(len(self.rows), slot, length)
                self.rows[slot], self._lengths[slot] = last, length

    def drop(self) -> None:
        """Give the memory of all slots back, when no row is left."""
        self._slots.drop()

    def embeds(self, rows: Sequence[Row], width: int) -> torch.Tensor:
        """Return what the language model reads, [rows, width, channels]; padding is behind."""
        pictures = [row.prompt.picture for row in rows]
        features = iter(self._features.of([each for each in pictures if each is not None]))
        contexts = [[*row.prompt.ids, *row.generated] for row in rows]
        padded = [ids + [0] * (width - len(ids)) for ids in contexts]
        embeds = self._embed(torch.tensor(padded, device=self._device))
        for number, (ids, picture) in enumerate(zip(contexts, pictures, strict=True)):
            if picture is not None:
                image, start = next(features), ids.index(self._image_token_id)
                embeds[number, start : start + len(image)] = image.to(embeds)
        return embeds

    def _masks(self, positions: torch.Tensor, columns: int, dtype: torch.dtype) -> Any:
        """Return which columns each row sees, in the form that the attention wants."""
        places, last = torch.arange(columns, device=positions.device), positions[:, None]
        if self._implementation.startswith("flash"):
            return (places <= last).long()  # it takes windows by itself
        masks: dict[str, torch.Tensor] = {}
        for window in self._slots.windows:
            seen = (places <= last)[:, None, None]
            if window is not None:
                seen = seen & (places > last - window)[:, None, None]
            if self._implementation == "eager":
                seen = torch.zeros_like(seen, dtype=dtype).masked_fill(
                    ~seen, torch.finfo(dtype).min
                )
            masks["full_attention" if window is None else "sliding_attention"] = seen
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _push(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        samplings = [row.prompt.sampling for row in rows]
        choices = choose(logits, samplings, [row.draws for row in rows], rows[0].token_text)
        for row, choice in zip(rows, choices, strict=True):
            if choice.error is not None:
                row.fail(choice.error)
            elif choice.is_number:
                row.push(choice.token, choice.logprob)
            else:
                row.end("error", _no_number(row, logits, self._embed.weight.dtype))
        if gone := {row for row in rows if row.finish_reason is not None}:
            self.leave(gone)


def _no_number(row: Row, logits: torch.Tensor, dtype: torch.dtype) -> VipLlavaError:
    name = str(dtype).removeprefix("torch.")
    remedy = "the weights are damaged" if dtype == torch.float32 else "try dtype=float32"
    return VipLlavaError(
        f"request {row.prompt.key!r}: behind {row.num_context} tokens the network's outputs are "
        f"no numbers any more, computed in {name}: {remedy}"
    )
