"""``POST /v1/regions/preview``: what a model would see of an image with marks."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vipllava.serve.conversation import ImageSource, read_regions
from vipllava.serve.errors import json_response
from vipllava.serve.lifecycle import until_disconnect
from vipllava.serve.pictures import as_data_uri, as_png
from vipllava.serve.schema import PreviewRequest, parse
from vipllava.serve.serving import Serving
from vipllava.types import Turn


async def answer_preview(request: Request, serving: Serving) -> Response:
    """Return what will answer a preview.

    Raises:
        ApiError: the body cannot be read, or says what cannot be drawn.
    """
    serving.lifecycle.check()
    return await serving.bodies.read(
        request, lambda values: _Preview(serving, parse(PreviewRequest, values))
    )


class _Preview(Response):
    """Draws while the client waits."""

    def __init__(self, serving: Serving, asked: PreviewRequest) -> None:
        super().__init__()
        self._serving, self._asked = serving, asked
        self._marks = read_regions(asked.regions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client leaves."""
        if not await until_disconnect(receive, self._answer(scope, receive, send)):
            raise ClientDisconnect

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving, as_json = self._serving, self._asked.format == "json"
        deadline_s = serving.settings.deadline_s
        deadline = asyncio.get_running_loop().time() + deadline_s
        with (
            serving.lifecycle.running(),
            serving.previews.enter() as place,
            serving.memory.hold() as held,
        ):
            async with serving.lifecycle.within(deadline, deadline_s):
                await place.start()
                source = ImageSource(self._asked.image, "image")
                turns = (Turn("user", ""),)
                marked = await serving.pictures.mark(source, turns, self._marks, held, key="image")
                drawn = marked.asked.overlay
                assert drawn is not None
                held.take(drawn.width * drawn.height * 3, "image")
                encode = as_data_uri if as_json else as_png
                encoded = await serving.pictures.run(encode, drawn)
            if isinstance(encoded, str):
                response = json_response(
                    {
                        "words": list(marked.asked.words),
                        "overlay": encoded,
                        "width": drawn.width,
                        "height": drawn.height,
                    }
                )
            else:
                response = Response(encoded, media_type="image/png")
            await response(scope, receive, send)
