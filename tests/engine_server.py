"""An engine behind a real server of chat completions on loopback, as a user would serve one."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from tests.chat_server import (
    Bad,
    ChatServer,
    Events,
    completion,
    listed,
    run_chat_server,
    streamed,
)
from vipllava.inference.engine import Engine
from vipllava.types import Request, Turn, VipLlavaError

_PNG = "data:image/png;base64,"


@contextmanager
def run_engine_server(engine: Engine) -> Iterator[ChatServer]:
    """Serve until the block ends; what the engine refuses is a status 400 with its message."""
    with run_chat_server() as server:

        def answer(body: dict[str, Any]) -> bytes | Bad | Events:
            if body.get("temperature") != 0:
                return Bad(400, b'{"error": {"message": "only temperature 0"}}')
            request = request_of(body)
            try:
                (text,) = engine.answer([request], max_new_tokens=body["max_tokens"])
            except VipLlavaError as error:
                return Bad(400, json.dumps({"error": {"message": str(error)}}).encode())
            tokens = len(engine.encoder.encode_generation_prompt(request.turns))
            if body.get("stream"):
                return streamed(*text, usage=(tokens, len(text)))
            reply = json.loads(completion(text)) | {"usage": {"prompt_tokens": tokens}}
            return json.dumps(reply).encode()

        server.answer = answer
        server.models = listed({"id": "toy", "max_model_len": 512})
        yield server


def request_of(body: dict[str, Any]) -> Request:
    """Read the request of a chat completion; an image stands in front of its text."""
    image, turns = None, []
    for message in body["messages"]:
        content, has_image = message["content"], False
        if not isinstance(content, str):
            part, text = content
            encoded = part["image_url"]["url"].removeprefix(_PNG)
            image = Image.open(io.BytesIO(base64.b64decode(encoded)))
            content, has_image = text["text"], True
        turns.append(Turn(message["role"], content, has_image=has_image))
    return Request(image, turns)
