"""The engine: batches of questions in, texts out; greedy, and the same whatever shares a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from vipllava.inference.devices import resolve_device, resolve_dtype
from vipllava.models.placing import OnDevice
from vipllava.models.quantization import QuantizationSettings, quantization_config
from vipllava.models.towers import normalise_pixels, preprocessing_of
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import CheckpointError, ConfigError, Request, VipLlavaError

_STOP_WINDOW = 16
"""Generated tokens that are looked at for a stop string; longer than any stop string has."""


class Engine:
    """Answers questions with one model.

    Args:
        model: the network; moved to ``device`` and put into eval mode.
        tokenizer: the model's, with the padding token.
        encoder: makes the ids of the prompt, by the model's chat template.
        image_transform: RGB picture to uint8 [3, height, width] as the model was trained with.
        device: where to run, see :func:`vipllava.inference.devices.resolve_device`. Weights in
            few bits stay where they were loaded.

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
    ) -> None:
        self.device = resolve_device(device)
        self.model: Any = model  # transformers' own annotations deny it `to` and `generate`
        self.model.eval()
        if not getattr(model, "is_quantized", False):
            self.model.to(self.device)
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.image_transform = image_transform

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

        Raises:
            CheckpointError: see :func:`vipllava.checkpoints.loading.open_source`; or the source
                names a chat template that is not known.
            ConfigError: the device is not there or does not compute in the dtype, or bitsandbytes
                is not installed.
        """
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
        return cls(model, opened.tokenizer, encoder, transform, device)

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Answer every question, greedily.

        Questions of similar length share a batch; shorter ones are padded on the left and masked,
        so an answer does not depend on its neighbours. The order of the answers is that of the
        requests.

        Args:
            requests: the questions.
            max_new_tokens: longest answer, tokens.
            batch_size: questions that run together.

        Returns:
            The texts, up to the template's stop, without blanks at their ends.

        Raises:
            VipLlavaError: a request's picture and turns contradict each other, its prompt is too
                long for the model, or a stage-1 model is asked without a picture; the message
                names the request's key.
            RecordError: a request's turns are not a conversation that asks something.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1"
            )
        if isinstance(requests, Request):
            raise VipLlavaError("requests is one Request: pass a list, answer([request])")
        prompts = [self._encode(request, max_new_tokens) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), i))
        answers = [""] * len(requests)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = self._generate(
                [prompts[i] for i in chosen],
                [image for i in chosen if (image := requests[i].image) is not None],
                max_new_tokens,
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
        return answers

    def _encode(self, request: Request, max_new_tokens: int) -> list[int]:
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
        limit = self.model.config.text_config.max_position_embeddings
        if len(ids) + max_new_tokens > limit:
            raise VipLlavaError(
                f"request {request.key!r} has {len(ids)} tokens, which with "
                f"max_new_tokens={max_new_tokens} exceeds the model's {limit} positions: shorten "
                "the conversation or lower max_new_tokens"
            )
        return ids

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], images: Sequence[Image.Image], max_new_tokens: int
    ) -> list[str]:
        width, pad = max(len(ids) for ids in prompts), self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(padded, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
        if images:
            pixels = torch.stack([self.image_transform(image.convert("RGB")) for image in images])
            inputs["pixel_values"] = normalise_pixels(
                pixels.to(self.device),
                self.model.dtype,
                preprocessing_of(self.model.config.vision_config),
            )
        generated = self.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(self.encoder.stop_token_ids),
            ),
            stopping_criteria=StoppingCriteriaList(
                [_StopStrings(self.encoder, width)] if self.encoder.stop_strings else []
            ),
        )
        # A row that stopped at a string, not at a token, is padded until its batch is done.
        rows = [[*row[width:].tolist(), pad] for row in generated]
        return [self.encoder.decode_answer(row[: row.index(pad)]).strip() for row in rows]


class _StopStrings(StoppingCriteria):
    """Stops a row once its generated text contains a stop string of the template."""

    def __init__(self, encoder: ConversationEncoder, prompt_width: int) -> None:
        self.encoder = encoder
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        start = max(self.prompt_width, input_ids.shape[1] - _STOP_WINDOW)
        stopped = [
            any(stop in text for stop in self.encoder.stop_strings)
            for text in (self.encoder.decode(row.tolist()) for row in input_ids[:, start:])
        ]
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)  # pyright: ignore
