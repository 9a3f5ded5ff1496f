"""Connections of clients that hang, drip or do not read: ended, so that they hold nothing."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from vipllava.serve.settings import ServerSettings

_log = logging.getLogger(__name__)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for headers and for readers, and a limit of connections.

    uvicorn itself bounds only the time between two requests. How long a body may take is the app's
    matter (:class:`vipllava.serve.bodies.Bodies`).
    """

    settings: ServerSettings
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin; a header must follow soon."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            _log.warning("more than %d connections: one is refused", self.settings.max_connections)
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come; a header that has begun must end soon."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._head = _stop(self._head)

    def on_response_complete(self) -> None:
        """End one response; a client that does not take the rest of it is left."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def pause_writing(self) -> None:
        """Wait for a reader, not for ever."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on: it has read."""
        self._write = _stop(self._write)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._head, self._write = _stop(self._head), _stop(self._write)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.settings.head_timeout_s, self.transport.abort)

    def _await_reader(self) -> None:
        if self._write is None:
            self._write = self.loop.call_later(self.settings.write_timeout_s, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def guarded_protocol(settings: ServerSettings) -> type[GuardedProtocol]:
    """Return the protocol with a server's limits: uvicorn makes one for each connection."""
    return type("GuardedProtocol", (GuardedProtocol,), {"settings": settings})
