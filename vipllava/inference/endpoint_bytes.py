"""How much an endpoint may send: the bytes of a reply, or of one event of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import httpx2

LONGEST_BODY: Final = 2**24
"""Bytes of a reply that is read as a whole."""
LONGEST_EVENT: Final = 2**21
"""Bytes of one event of a stream; log probabilities of a token are some thousand."""
_EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\r\n\r\n")


async def bound(response: httpx2.Response) -> None:
    """Have a response break off with RemoteProtocolError where it gets too long.

    Raises:
        httpx2.RemoteProtocolError: it is compressed, so that nothing says how long it is.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        said = f"the reply is compressed ({encoding[:40]}), which was not asked for"
        raise httpx2.RemoteProtocolError(said, request=response.request)
    response.stream = _Bounded(response.stream, response.request, is_stream(response))


def is_stream(response: httpx2.Response) -> bool:
    """Whether a response is read as it comes."""
    return response.headers.get("content-type", "").startswith("text/event-stream")


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: Any, request: httpx2.Request, has_events: bool) -> None:
        self._stream, self._request, self._has_events = stream, request, has_events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        most = LONGEST_EVENT if self._has_events else LONGEST_BODY
        size, tail = 0, b""
        async for part in self._stream:
            size += len(part)
            if self._has_events:
                tail += part
                ends = [at + len(end) for end in _EVENT_ENDS if (at := tail.rfind(end)) >= 0]
                if ends:
                    size = len(tail) - max(ends)
                tail = tail[-3:]
            if size > most:
                what = "an event of its stream" if self._has_events else "its reply"
                said = f"the endpoint sends too much: {what} has more than {most} bytes"
                raise httpx2.RemoteProtocolError(said, request=self._request)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
