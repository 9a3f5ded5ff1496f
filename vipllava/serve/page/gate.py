"""What comes to the page: from itself only, in bounded bodies, and only for what a page needs."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vipllava.serve.errors import ApiError
from vipllava.serve.limits import Held, Memory

MOST_JSON: Final = 4 * 2**20
"""Bytes of an event or of marks, e.g. of a hundred thousand points."""
CLOSE: Final = {"Connection": "close"}
"""Of a response to a request whose body was not read."""
_GET: Final = frozenset(
    "/ /config /config/ /favicon.ico /robots.txt /theme.css "
    "/gradio_api/app_id /gradio_api/info /gradio_api/queue/data /gradio_api/startup-events "
    "/gradio_api/theme.css".split()
)
_FOLDERS: Final = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_POST: Final = frozenset(
    "/gradio_api/queue/join /gradio_api/run/predict /gradio_api/cancel /gradio_api/reset".split()
)


class GradioGate:
    """Lets through what a browser that shows the page asks of Gradio.

    Its other routes write conversations or files to the disk, or read them from there.

    Args:
        app: Gradio's.
        memory: takes bodies while they are read.
        body_timeout_s: within which a body arrives.
    """

    def __init__(self, app: ASGIApp, memory: Memory, body_timeout_s: float) -> None:
        self.app, self.memory, self.body_timeout_s = app, memory, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, path = Request(scope, receive), scope["path"].removeprefix(scope["root_path"])
        if request.method == "POST" and path in _POST:
            check_origin(request)
        elif request.method not in ("GET", "HEAD") or not (
            path in _GET or path.startswith(_FOLDERS)
        ):
            raise HTTPException(404, "the page has nothing here", CLOSE)
        with self.memory.hold() as held:
            body = await read_body(request, MOST_JSON, held, self.body_timeout_s)
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def again() -> Message:
                return first.pop() if first else await receive()

            await self.app(scope, again, send)


def check_origin(request: Request) -> None:
    """Refuse what another web page has a visitor's browser send.

    Raises:
        HTTPException: 403.
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is not None:  # browsers leave the former out of plain HTTP
        ours = (headers.get("host"), headers.get("x-forwarded-host"))
        site = "same-origin" if urlsplit(origin).netloc in ours else "cross-site"
    if site not in (None, "same-origin", "none"):
        raise HTTPException(403, "only the page itself may send this, no other web page", CLOSE)


async def read_body(request: Request, most: int, held: Held, timeout_s: float) -> bytes:
    """Return a body.

    Args:
        request: whose body has not been read.
        most: bytes that it may have.
        held: takes its memory.
        timeout_s: within which it arrives.

    Raises:
        HTTPException: 408, 413, or 429 where the memory is full.
        ClientDisconnect: the client has left.
    """
    read = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                read += part
                if len(read) > most:
                    raise HTTPException(413, f"this page takes at most {most} bytes", CLOSE)
                held.take(len(part))
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {timeout_s:g} s", CLOSE) from None
    except ApiError as error:
        raise as_http(error) from error
    return bytes(read)


def as_http(error: ApiError) -> HTTPException:
    """Return an error as the page's script reads it."""
    return HTTPException(error.status, str(error), error.headers)
