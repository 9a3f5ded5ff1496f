"""An engine of the tiny model, and questions of several lengths for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from vipllava.conversation import ConversationEncoder, get_template
from vipllava.inference.engine import Engine
from vipllava.inference.protocol import Generation, Sampling
from vipllava.models.towers import CLIP, normalise_pixels
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import Request, Turn

# Short, so that a prompt of the byte tokenizer stays short.
TEMPLATE = replace(get_template("llava_v1"), system="")


def make_engine(parts: Any, template: Any = TEMPLATE, **options: Any) -> Engine:
    model, tokenizer = parts
    encoder = ConversationEncoder(
        tokenizer,
        template,
        image_token_id=model.config.image_token_id,
        image_seq_length=4,
        max_length=512,
    )
    transform = ImageTransform(28, "pad", CLIP.preprocessing)
    return Engine(model, tokenizer, encoder, transform, "cpu", **options)


def mixed_requests(count: int) -> list[Request]:
    """With and without image, of one turn and of two, of different lengths."""
    generator = np.random.default_rng(0)
    requests = []
    for index in range(count):
        has_image = index % 3 != 2
        pixels = generator.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        text = "what is this?"[: 1 + index % 13] * (1 + index % 4)
        turns = [Turn("user", text, has_image=has_image)]
        if index % 5 == 4:
            turns += [Turn("assistant", "a cat"), Turn("user", "sure?")]
        image = Image.fromarray(pixels) if has_image else None
        requests.append(Request(image, turns, key=f"q{index}"))
    return requests


def question(key: str = "q", text: str = "what is this?") -> Request:
    return Request(None, [Turn("user", text)], key)


def asked(requests: list[Request], **sampling: Any) -> list[Generation]:
    return [Generation(request, Sampling(**sampling)) for request in requests]


def generated_ids(engine: Engine, request: Request, num_tokens: int, **config: Any) -> list[int]:
    """Return what transformers' own ``generate`` answers, alone, from ids and pixels."""
    ids = torch.from_numpy(engine.encoder.encode_generation_prompt(request.turns))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request.image is not None:
        pixels = engine.image_transform(request.image)[None]
        inputs["pixel_values"] = normalise_pixels(pixels, torch.float32, CLIP.preprocessing)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=engine.tokenizer.pad_token_id,
        eos_token_id=list(engine.encoder.stop_token_ids),
        **config,
    )
    with torch.inference_mode():
        return engine.model.generate(**inputs, generation_config=settings)[
            0, ids.shape[1] :
        ].tolist()


def generated_text(engine: Engine, request: Request, num_tokens: int, **config: Any) -> str:
    ids = generated_ids(engine, request, num_tokens, **config)
    return engine.encoder.decode_answer(ids).strip()
