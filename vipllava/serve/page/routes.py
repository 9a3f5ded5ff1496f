"""What the page asks for beside Gradio's events: pictures in and out, and what marks look like.

Bytes come as they are, not as a file that Gradio would keep: nothing of a person reaches the disk,
and no path of a request is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vipllava.serve.errors import ApiError
from vipllava.serve.lifecycle import until_disconnect
from vipllava.serve.limits import Held
from vipllava.serve.page.examples import Example
from vipllava.serve.page.gate import CLOSE, MOST_JSON, as_http, check_origin, read_body
from vipllava.serve.page.marks_of_page import describe, read_marks
from vipllava.serve.page.pictures import Picture, PictureGone, PictureStore, small_jpeg
from vipllava.serve.page.work import Lane
from vipllava.types import VipLlavaError

Args = TypeVarTuple("Args")
T = TypeVar("T")
_FOR_GOOD: Final = {"Cache-Control": "private, max-age=86400, immutable"}


def build_routes(
    store: PictureStore, examples: Sequence[Example], body_timeout_s: float = 30.0
) -> APIRouter:
    """Return the page's own routes, all below ``page/``.

    Args:
        store: keeps the pictures.
        examples: what the page offers.
        body_timeout_s: within which a request's body arrives.
    """
    router = APIRouter(prefix="/page", include_in_schema=False)
    own: Any = [Depends(check_origin)]

    def reply(picture: Picture) -> dict[str, Any]:
        width, height = picture.size
        return {"picture": picture.name, "width": width, "height": height}

    @router.post("/pictures", dependencies=own)
    async def open_picture(request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            # Others need no permission when another web page has a visitor's browser send them.
            raise HTTPException(
                415,
                f"Content-Type is {kind[:100]!r}; expected image/* or application/octet-stream",
                CLOSE,
            )
        with store.work.memory.hold() as held:
            data = await read_body(request, store.limits.most_bytes, held, body_timeout_s)
            return reply(await _while_wanted(request.receive, store.work.drawing, store.open, data))

    @router.get("/pictures/{name}")
    async def show_picture(name: str) -> Response:
        return _Drawing(store, lambda: store.shown(store.picture(name)))

    @router.post("/plan", dependencies=own)
    async def plan(request: Request) -> dict[str, Any]:
        with store.work.memory.hold() as held:
            body = await _json(request, held, body_timeout_s)

            def planned() -> dict[str, Any]:
                picture = store.picture(str(body.get("picture")))
                found, shown = describe(read_marks(body.get("marks")), picture.size)
                drawn = None if found is None else store.keep_drawn(picture, found)
                return {"marks": shown, "drawn": drawn}

            return await _while_wanted(request.receive, store.work.planning, planned)

    @router.get("/drawn/{name}.png")
    async def show_drawn(name: str) -> Response:
        return _Drawing(store, lambda: (store.drawn_png(name), "image/png"))

    @router.get("/drawn/{name}/small.jpg")
    async def show_small(name: str) -> Response:
        return _Drawing(store, lambda: (small_jpeg(store.draw(name)), "image/jpeg"))

    @router.get("/examples/{number}.jpg")
    async def show_example(number: int) -> Response:
        return Response(small_jpeg(_at(examples, number).image), media_type="image/jpeg")

    @router.post("/examples/{number}", dependencies=own)
    async def open_example(number: int, request: Request) -> dict[str, Any]:
        example = _at(examples, number)
        picture = await _while_wanted(
            request.receive, store.work.drawing, store.keep, example.image, example.sha256
        )
        return reply(picture) | {"marks": example.marks, "question": example.question}

    return router


def _at(examples: Sequence[Example], number: int) -> Example:
    if not 0 <= number < len(examples):
        raise HTTPException(404, f"there is no example {number}")
    return examples[number]


class _Drawing(Response):
    """A picture, encoded while the client waits for it."""

    def __init__(self, store: PictureStore, job: Callable[[], tuple[bytes, str]]) -> None:
        super().__init__()
        self._work, self._job = store.work, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client leaves."""
        with self._work.memory.hold() as held:
            content, kind = await _while_wanted(receive, self._work.drawing, self._job)
            try:
                held.take(len(content))
            except ApiError as error:
                raise as_http(error) from error
            await Response(content, media_type=kind, headers=_FOR_GOOD)(scope, receive, send)


async def _while_wanted(
    receive: Receive, lane: Lane, job: Callable[[Unpack[Args]], T], *args: *Args
) -> T:
    """Return what a job returns; it is not begun for a client that has left.

    Raises:
        HTTPException: what a person can act on, with the status that fits.
        ClientDisconnect: the client has left.
    """
    done: list[T] = []

    async def work() -> None:
        done.append(await lane.run(job, *args))

    try:
        if not await until_disconnect(receive, work()):
            raise ClientDisconnect
    except PictureGone as error:
        raise HTTPException(410, str(error)) from error
    except VipLlavaError as error:
        raise HTTPException(422, str(error)) from error
    except ApiError as error:
        raise as_http(error) from error
    return done[0]


async def _json(request: Request, held: Held, timeout_s: float) -> dict[str, Any]:
    try:
        body: Any = json.loads(await read_body(request, MOST_JSON, held, timeout_s))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is no JSON object")
    return body
