"""Images of requests: read, decoded, marked and encoded, by a few threads within a bound of memory.

What a request says is never a path: data URIs, and, where the server allows them, addresses of the
public internet.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, TypeVarTuple, Unpack

from PIL import Image

from vipllava.files.pools import threads_beside_a_loop
from vipllava.files.public_fetch import fetch_public
from vipllava.inference.image_sources import bytes_of_data_uri
from vipllava.inference.marked import Asked, mark_request
from vipllava.records.image_decode import decode_image, image_size, not_of_a_record
from vipllava.serve.conversation import ImageSource
from vipllava.serve.drawing_work import MOST_WORK, decoding_work, drawing_work
from vipllava.serve.errors import ApiError, of_fault
from vipllava.serve.limits import Held
from vipllava.serve.settings import MB, ServerSettings
from vipllava.types import RecordError, Turn, VipLlavaError
from vipllava.visual_prompts.marks import Mark, plan_marks

Args = TypeVarTuple("Args")
T = TypeVar("T")
_STARTS: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
_COPIES: Final = 2
"""Of an image, of 3 bytes a pixel: what was decoded, and what is drawn on it."""
_FETCH_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Marked:
    """A marked image and a conversation about it."""

    asked: Asked
    overlay: str | None = None  # the marked image as a data URI of a PNG


class Pictures:
    """Works on images for all requests of a server; to be closed."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._workers = threads_beside_a_loop(settings.picture_threads, "picture")
        self._fetchers = threads_beside_a_loop(_FETCH_THREADS, "fetch")

    def close(self) -> None:
        """Drop what waits, and wait for what runs: seconds, since images are bounded."""
        for pool in (self._workers, self._fetchers):
            pool.shutdown(wait=True, cancel_futures=True)

    async def run(self, job: Callable[[Unpack[Args]], T], *args: *Args) -> T:
        """Return what a job returns that one of the threads does."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, job, *args)

    async def mark(
        self,
        source: ImageSource | None,
        turns: Sequence[Turn],
        marks: Sequence[Mark],
        held: Held,
        *,
        key: str,
        with_overlay: bool = False,
    ) -> Marked:
        """Decode an image, draw marks on it and put their words into the texts.

        Args:
            source: the image, or None for a conversation without an image.
            turns: the conversation.
            marks: on the image.
            held: takes the image's memory until the request ends.
            key: of the request, see :class:`vipllava.types.Request`.
            with_overlay: whether the marked image is encoded.

        Raises:
            ApiError: the image cannot be read or is too large, the memory is full, or a mark
                cannot be drawn or named.
        """
        if source is None:
            return Marked(self._mark(None, turns, marks, key))
        data = await self._read(source, held)
        width, height = await self.run(self._checked_size, data, source.param)
        held.take(width * height * 3 * _COPIES * (2 if with_overlay else 1), source.param)

        def draw() -> Marked:
            try:
                with not_of_a_record():
                    image = decode_image(data, source.param)
            except RecordError as fault:
                raise _refused(fault, source.param) from None
            asked = self._mark(image, turns, marks, key)
            drawn = asked.overlay
            return Marked(asked, as_data_uri(drawn) if with_overlay and drawn else None)

        return await self.run(draw)

    async def _read(self, source: ImageSource, held: Held) -> bytes:
        url, param = source.url, source.param
        if url[:5].lower() == "data:":
            held.take(len(url) + len(url) * 3 // 4, param)  # the request keeps both
            return await self.run(_read_data_uri, url, param)
        if url[:8].lower().startswith(("http://", "https://")):
            if not self.settings.allow_image_urls:
                raise ApiError(
                    400,
                    f"{param} is an address, and this server fetches none: send the image itself "
                    "as a data URI (or start the server with --allow-image-urls)",
                    param=param,
                    code="image_urls_off",
                )
            most = int(self.settings.max_body_mb * MB)
            held.take(most, param)
            loop = asyncio.get_running_loop()
            try:
                data = await loop.run_in_executor(self._fetchers, fetch_public, url, most)
            except VipLlavaError as fault:
                raise ApiError(400, f"{param}: {fault}", param=param, code="image_url") from None
            held.give_back(most - len(data))
            return data
        raise ApiError(
            400,
            f"{param} is {url[:40]!r}; expected data:image/png;base64,... (JPEG, PNG or WebP)",
            param=param,
            code="invalid_image",
        )

    def _checked_size(self, data: bytes, param: str) -> tuple[int, int]:
        expected = "expected a JPEG, PNG or WebP image"
        if not data.startswith(_STARTS):
            raise ApiError(
                400, f"{param}: {len(data)} bytes starting with {data[:8]!r}; {expected}",
                param=param, code="invalid_image",
            )  # fmt: skip
        try:
            with not_of_a_record():
                width, height = image_size(data, key=param)
        except RecordError as fault:
            raise _refused(fault, param) from None
        if width * height > self.settings.max_pixels:
            raise ApiError(
                400,
                f"{param}: the image has {width} x {height} pixels; at most "
                f"{self.settings.max_pixels} are read: send a smaller one",
                param=param,
                code="image_too_large",
            )
        return width, height

    def _mark(
        self, image: Image.Image | None, turns: Sequence[Turn], marks: Sequence[Mark], key: str
    ) -> Asked:
        try:
            if image is not None and marks:
                _check_work(marks, image.size)
            return mark_request(image, turns, marks, key=key)
        except VipLlavaError as fault:
            raise of_fault(fault) from None


def _check_work(marks: Sequence[Mark], size: tuple[int, int]) -> None:
    work = decoding_work(marks)
    if work <= MOST_WORK:
        work += drawing_work(plan_marks(marks, size))
    if work > MOST_WORK:
        raise ApiError(
            400,
            f"drawing the regions takes {work / MOST_WORK:.1f} times what one request may: send "
            "fewer or smaller ones, thinner lines, or a smaller image",
            param="regions",
            code="drawing_too_large",
        )


def as_png(image: Image.Image) -> bytes:
    """Return an image as PNG; the first level of compression is several times faster."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def as_data_uri(image: Image.Image) -> str:
    """Return an image as data URI of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(as_png(image)).decode()}"


def _read_data_uri(url: str, param: str) -> bytes:
    try:
        return bytes_of_data_uri(url, key=param)
    except RecordError as fault:
        raise _refused(fault, param) from None


def _refused(fault: RecordError, param: str) -> ApiError:
    code = "image_too_large" if fault.fault == "image-too-large" else "invalid_image"
    return ApiError(400, str(fault), param=param, code=code)
