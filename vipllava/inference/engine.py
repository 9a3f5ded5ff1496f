"""The engine: a model, what it reads questions with, and batches of questions in, texts out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.loading import open_source
from vipllava.conversation import ConversationEncoder, get_template
from vipllava.inference.answer_text import Detokenizer
from vipllava.inference.decoding import Decoding, Prompt, Row
from vipllava.inference.devices import dispatch, resolve_device, resolve_dtype
from vipllava.inference.features import ImageFeatures, Picture
from vipllava.inference.protocol import Generation, PromptTooLong, Sampling
from vipllava.models.placing import OnDevice
from vipllava.models.quantization import QuantizationSettings, quantization_config
from vipllava.models.towers import image_features, preprocessing_of
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import CheckpointError, ConfigError, Request, VipLlavaError

FEATURE_BYTES: Final = 2**28
"""Image features that are kept: those of 56 images of a 7B."""
PREFILL_TOKENS: Final = 8192
"""Of prompts that are read at once, padding included: more would not be faster, only larger."""
_JOIN_SHARE: Final = 4
"""Questions of a list join once so great a share of the batch is free, not one by one."""


class Engine:
    """Answers questions with one model.

    Args:
        model: the network; moved to ``device`` and put into eval mode.
        tokenizer: the model's, with the padding token.
        encoder: makes the ids of the prompt, by the model's chat template.
        image_transform: RGB picture to uint8 [3, height, width] as the model was trained with.
        device: where to run, see :func:`vipllava.inference.devices.resolve_device`. Weights in
            few bits, or on several devices, stay where they are.
        feature_bytes: image features that are kept for images asked about again; 0 keeps none.

    Raises:
        ConfigError: the device is not there.
    """

    def __init__(
        self,
        model: VipLlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        encoder: ConversationEncoder,
        image_transform: Callable[[Image.Image], torch.Tensor],
        device: torch.device | str = "auto",
        *,
        feature_bytes: int = FEATURE_BYTES,
    ) -> None:
        self.model: Any = model  # transformers' own annotations deny it `to` and `generate`
        self.model.eval()
        if getattr(model, "hf_device_map", None) is None:
            self.device = resolve_device(device)
            if not getattr(model, "is_quantized", False):
                self.model.to(self.device)
        else:
            # accelerate's hooks take it on from there; what is held elsewhere is hollow.
            parameters = (self.model.get_input_embeddings().weight, *self.model.parameters())
            self.device = next(each.device for each in parameters if not each.is_meta)
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.image_transform = image_transform
        self.features = ImageFeatures(self._features, feature_bytes)
        self._detokenizer = Detokenizer(encoder)

    @property
    def max_positions(self) -> int:
        """Ids that a prompt and its answer may have together."""
        return self.model.config.text_config.max_position_embeddings

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        device: torch.device | str = "auto",
        dtype: str = "auto",
        *,
        attn_implementation: str = "sdpa",
        vision_tower: str | None = None,
        base: str | None = None,
        chat_template: str | None = None,
        bits: int | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        feature_bytes: int = FEATURE_BYTES,
    ) -> Engine:
        """Open a model of any format: a stage's export, a published one, an adapter on its base.

        Args:
            source: folder or Hugging Face id; if it does not say which chat template and image
                aspect to use, they are those of the published checkpoints.
            device: see :class:`Engine`.
            dtype: see :func:`vipllava.inference.devices.resolve_dtype`.
            attn_implementation: as transformers names it.
            vision_tower: see :func:`vipllava.checkpoints.loading.open_source`, as the next two.
            base: what an adapter is put on.
            chat_template: the template it was trained with, where the source does not say.
            bits: 4 or 8 hold the language model's blocks in as many (bitsandbytes); tower,
                projector and head keep ``dtype``.
            device_map: ``auto`` spreads one model over all devices that are there, by accelerate;
                or what of it goes where, see :func:`vipllava.inference.devices.dispatch`.
            feature_bytes: see :class:`Engine`.

        Raises:
            CheckpointError: see :func:`vipllava.checkpoints.loading.open_source`; or the source
                names a chat template that is not known.
            ConfigError: the device is not there or does not compute in the dtype, bitsandbytes or
                accelerate is not installed, or the options exclude each other.
        """
        if device_map is not None and (bits is not None or str(device) != "auto"):
            taken = f"bits={bits}" if bits is not None else f"device={str(device)!r}"
            raise ConfigError(
                f"device_map={device_map!r} spreads whole weights over several devices and does "
                f"not go with {taken}: leave one of them out"
            )
        device = resolve_device(device)
        opened = open_source(
            str(source), vision_tower=vision_tower, base=base, chat_template=chat_template
        )
        meta = opened.meta
        try:
            template = get_template(meta.chat_template)
        except ConfigError as error:  # before the weights are read
            raise CheckpointError(
                f"{source} says that it answers in a template that is not known here: {error}, "
                "with chat_template=NAME"
            ) from error
        torch_dtype = resolve_dtype(dtype, device)
        options: dict[str, Any] = {}
        if bits is not None:
            name = str(torch_dtype).removeprefix("torch.")
            settings = QuantizationSettings(bits=bits, compute_dtype=name)
            options["quantization_config"] = quantization_config(settings)
            options["placement"] = OnDevice(device)
            # Added to weights in few bits, an adapter would make them whole again.
            options["merge_adapter"] = False
        model = opened.network(
            dtype=torch_dtype, attn_implementation=attn_implementation, **options
        )
        config: Any = model.config
        encoder = ConversationEncoder(
            opened.tokenizer,
            template,
            image_token_id=config.image_token_id,
            image_seq_length=meta.image_seq_length,
            max_length=config.text_config.max_position_embeddings,
        )
        preprocessing = preprocessing_of(config.vision_config)
        transform = ImageTransform(meta.image_size, meta.image_aspect, preprocessing)
        if device_map is not None:
            dispatch(model, device_map)
        tools = opened.tokenizer, encoder, transform
        return cls(model, *tools, device, feature_bytes=feature_bytes)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answer every question; greedily, if not told otherwise.

        Who has its answer makes room for the next question, so that a long answer holds nobody up.
        Rows do not see each other: an answer does not depend on its neighbours. The order of the
        answers is that of the requests.

        Args:
            requests: the questions.
            max_new_tokens: longest answer, tokens.
            batch_size: questions that run together.
            sampling: how answers are chosen; its own ``max_new_tokens`` counts then.

        Returns:
            The texts, up to the template's stop, without blanks at their ends.

        Raises:
            VipLlavaError: a request's picture and turns contradict each other, its prompt is too
                long for the model (PromptTooLong), or a stage-1 model is asked without a picture;
                the message names the request's key.
            RecordError: a request's turns are not a conversation that asks something.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1"
            )
        if isinstance(requests, Request):
            raise VipLlavaError("requests is one Request: pass a list, answer([request])")
        sampling = sampling or Sampling(max_new_tokens=max_new_tokens)
        asked = [Generation(request, sampling) for request in requests]
        ids = [self.encode_ids(each) for each in asked]
        order = deque(sorted(range(len(asked)), key=lambda i: (len(ids[i]), i)))
        texts = [""] * len(asked)
        numbers: dict[Row, int] = {}
        batch = self.decoding()
        while order or numbers:
            free = batch_size - len(numbers)
            if order and (not numbers or free >= max(1, batch_size // _JOIN_SHARE)):
                joining: list[Row] = []
                while order and len(joining) < free and not _is_full(joining, len(ids[order[0]])):
                    number = order.popleft()
                    row = self.row(self.prompt(asked[number], ids[number]), streams=False)
                    numbers[row] = number
                    joining.append(row)
                advanced = self.search(joining) if sampling.num_beams > 1 else batch.join(joining)
            else:
                advanced = batch.step()
            for row in advanced:
                if row.error is not None:
                    raise row.error
                if row.finish_reason is not None:
                    texts[numbers.pop(row)] = row.take()[0]
        return texts

    def prompt(self, asked: Generation, ids: Sequence[int] | None = None) -> Prompt:
        """Return a question as the network reads it; several threads may ask at once.

        Args:
            asked: the question.
            ids: what :meth:`encode_ids` says, where that is known.

        Raises:
            VipLlavaError: as :meth:`answer` does.
        """
        ids = self.encode_ids(asked) if ids is None else ids
        image = asked.request.image
        picture = None if image is None else Picture.of(self.image_transform(image.convert("RGB")))
        before = self.encoder.what_stands_before(ids, len(ids))
        return Prompt(asked.request.key, ids, picture, asked.sampling, before)

    def row(self, prompt: Prompt, *, streams: bool = True) -> Row:
        """Return the answer to a prompt, yet to be worked out.

        Args:
            prompt: the question.
            streams: whether its text is asked for before its end.
        """
        encoder = self.encoder
        stops = (*encoder.stop_strings, *prompt.sampling.stop)
        stop_ids = frozenset(encoder.stop_token_ids)
        return Row(prompt, self._detokenizer, stop_ids, stops, streams)

    def decoding(self) -> Decoding:
        """Return an empty batch; one thread uses it and the engine's features."""
        return Decoding(self.model, self.features, self.device)

    @torch.inference_mode()
    def search(
        self, rows: Sequence[Row], is_cancelled: Callable[[], bool] = lambda: False
    ) -> list[Row]:
        """Answer by beam search, one row after the other, with transformers' ``generate``.

        Args:
            rows: whose sampling has several beams.
            is_cancelled: asked after each token; what is left then ends as ``cancelled``.
        """
        batch = self.decoding()
        for row in rows:
            sampling = row.prompt.sampling
            embeds = batch.embeds([row], row.num_context)
            generated = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=sampling.num_beams,
                    max_new_tokens=sampling.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=list(self.encoder.stop_token_ids),
                ),
                stopping_criteria=StoppingCriteriaList([_Cancelled(is_cancelled)]),
            )
            if is_cancelled():
                row.end("cancelled")
                continue
            for token in generated[0].tolist():
                row.push(token)
                if row.finish_reason is not None:
                    break
        return list(rows)

    @torch.inference_mode()
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return image_features(self.model, pixels.to(self.device))

    def encode_ids(self, asked: Generation) -> list[int]:
        """Return the ids of a prompt, those of its image included.

        Raises:
            VipLlavaError: as :meth:`answer` does.
        """
        request, max_new_tokens = asked.request, asked.sampling.max_new_tokens
        if request.more_images:
            raise VipLlavaError(
                f"request {request.key!r} has {1 + len(request.more_images)} images, and this "
                "model takes one: leave out more_images"
            )
        num_images = sum(turn.has_image for turn in request.turns)
        if num_images != (request.image is not None):
            raise VipLlavaError(
                f"request {request.key!r} has {'no' if request.image is None else 'a'} picture, "
                f"but {num_images} of its turns say has_image: mark the first user turn, or leave "
                "the picture out"
            )
        if self.encoder.template.drops_user_text and not num_images:
            raise VipLlavaError(
                f"request {request.key!r} asks without a picture, and the chat template "
                f"{self.encoder.template.name!r} of this model leaves the question out: it is a "
                "stage-1 model, which captions pictures; use one of a later stage"
            )
        ids = self.encoder.encode_generation_prompt(request.turns, request.key).tolist()
        room = self.max_positions - len(ids)
        if room < 1:
            raise PromptTooLong(
                f"request {request.key!r} has {len(ids)} tokens, and the model's "
                f"{self.max_positions} positions are for it and its answer: shorten the "
                "conversation"
            )
        if max_new_tokens > room:
            raise PromptTooLong(
                f"request {request.key!r} has {len(ids)} tokens, which leaves {room} of the "
                f"model's {self.max_positions} positions to the answer, and "
                f"max_new_tokens={max_new_tokens}: lower it, or shorten the conversation",
                room,
            )
        return ids


def _is_full(joining: Sequence[Row], length: int) -> bool:
    """Whether rows that are read together leave no room for one of this length, the longest."""
    return bool(joining) and (len(joining) + 1) * length > PREFILL_TOKENS


class _Cancelled(StoppingCriteria):
    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        shape, device = input_ids.shape[:1], input_ids.device
        return torch.full(shape, self.is_cancelled(), device=device)  # pyright: ignore
