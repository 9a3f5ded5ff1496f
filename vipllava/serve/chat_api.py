"""``POST /v1/chat/completions``: request, admission, image and marks, engine, answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vipllava.inference.protocol import Delta, Generation, TokenLogprob
from vipllava.serve.completion import DONE, Shape, event
from vipllava.serve.conversation import read_conversation, read_sampling
from vipllava.serve.errors import ApiError, json_response
from vipllava.serve.lifecycle import until_disconnect
from vipllava.serve.limits import Held
from vipllava.serve.request_log import Note
from vipllava.serve.schema import ChatRequest, parse
from vipllava.serve.serving import ServedModel, Serving

_EVENTS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in front hands on each event as it comes
]


async def answer_chat(request: Request, serving: Serving) -> Response:
    """Return what will answer a chat completion.

    Raises:
        ApiError: the body cannot be read, or says what no model can be asked.
    """
    note: Note = request.scope["state"]["note"]
    serving.lifecycle.check()

    def check(values: object) -> Response:
        asked = parse(ChatRequest, values)
        model = serving.model(asked.model)
        note.model, note.stream = model.name, bool(asked.stream)
        return _ChatAnswer(serving, model, asked, note)

    return await serving.bodies.read(request, check)


class _ChatAnswer(Response):
    """Answers while the client waits; what is wrong before the first byte has an HTTP status."""

    def __init__(
        self, serving: Serving, model: ServedModel, asked: ChatRequest, note: Note
    ) -> None:
        super().__init__()
        self._serving, self._model, self._asked, self._note = serving, model, asked, note
        settings = serving.settings
        positions = model.engine.max_positions
        self._sampling = read_sampling(asked, settings, positions)
        self._conversation = read_conversation(asked, settings, positions)
        self._key = uuid.uuid4().hex
        options = asked.stream_options
        self._shape = Shape(
            f"chatcmpl-{self._key}",
            model.name,
            with_logprobs=bool(asked.logprobs),
            with_usage=bool(options and options.include_usage),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client leaves."""
        if not await until_disconnect(receive, self._answer(scope, receive, send)):
            self._note.finish_reason = "cancelled"
            raise ClientDisconnect

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self._serving.settings.deadline_s
        async with AsyncExitStack() as stack:
            stack.enter_context(self._serving.lifecycle.running())
            place = stack.enter_context(self._model.admission.enter())
            held = stack.enter_context(self._serving.memory.hold())
            async with self._within(deadline):
                generation, extra = await self._prepare(held)
                await place.start()
            deltas = await stack.enter_async_context(aclosing(self._deltas(generation, deadline)))
            if self._asked.stream:
                await self._stream(deltas, extra, send)
            else:
                response = await self._whole(deltas, extra)
                await response(scope, receive, send)

    def _within(self, deadline: float) -> Any:
        return self._serving.lifecycle.within(deadline, self._serving.settings.deadline_s)

    async def _prepare(self, held: Held) -> tuple[Generation, dict[str, Any] | None]:
        said = self._conversation
        with_overlay = bool(self._asked.overlay)
        marked = await self._serving.pictures.mark(
            said.image, said.turns, said.marks, held, key=self._key, with_overlay=with_overlay
        )
        extra: dict[str, Any] | None = None
        if said.marks or with_overlay:
            extra = {"words": list(marked.asked.words), "overlay": marked.overlay}
        return Generation(marked.asked.request, self._sampling), extra

    async def _deltas(self, generation: Generation, deadline: float) -> AsyncGenerator[Delta]:
        """Yield the deltas, each within the deadline; the last one has a reason to finish."""
        async with aclosing(self._model.generate(generation)) as deltas:
            while True:
                async with self._within(deadline):
                    delta = await anext(deltas)
                if delta.finish_reason == "cancelled":
                    raise ApiError(503, "the engine cancelled the request", code="cancelled",
                                   retry_after_s=1)  # fmt: skip
                if self._note.first_token_s is None and (delta.text or delta.finish_reason):
                    self._note.first_token_s = self._note.seconds
                if delta.finish_reason is not None:
                    self._note.finish_reason = delta.finish_reason
                    self._note.usage = delta.usage
                yield delta
                if delta.finish_reason is not None:
                    return

    async def _whole(self, deltas: AsyncGenerator[Delta], extra: dict[str, Any] | None) -> Response:
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        async for delta in deltas:
            texts.append(delta.text)
            logprobs += delta.logprobs
        reason = self._note.finish_reason or "stop"
        return json_response(
            self._shape.whole("".join(texts), reason, self._note.usage, logprobs, extra)
        )

    async def _stream(
        self, deltas: AsyncGenerator[Delta], extra: dict[str, Any] | None, send: Send
    ) -> None:
        first = await anext(deltas)  # what is wrong with the request has shown by now

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        await write(self._shape.chunk({"role": "assistant", "content": ""}))
        try:
            delta = first
            while True:
                if delta.text or delta.logprobs:
                    await write(self._shape.chunk({"content": delta.text}, None, delta.logprobs))
                if delta.finish_reason is not None:
                    break
                delta = await anext(deltas)
            last = {} if extra is None else {"vipllava": extra}
            await write(self._shape.chunk(last, delta.finish_reason))
            if self._shape.with_usage:
                await write(self._shape.last(delta.usage))
        except ApiError as error:  # the status has been sent
            self._note.status, self._note.error = error.status, error.code
            self._note.finish_reason = "error"
            await write(event(error.body))
        await write(DONE, more=False)
