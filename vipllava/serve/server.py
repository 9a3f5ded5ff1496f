"""The process that serves: it listens, hears signals, and ends when everything is answered."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import uvicorn

from vipllava.processes import SAME_CTRL_C_S
from vipllava.serve.connections import guarded_protocol
from vipllava.serve.lifecycle import Lifecycle
from vipllava.serve.serving import Serving
from vipllava.serve.settings import ServerSettings
from vipllava.types import ConfigError

_CLOSING_S: Final = 2
"""Seconds in which open connections may close by themselves when everything is answered."""
_CUT_S: Final = 1.0
"""Seconds in which requests that were cut off may say so."""
_LONGEST_HEADER: Final = 32 * 1024
_log = logging.getLogger(__name__)


class GracefulServer(uvicorn.Server):
    """A server that goes on listening while it ends, so that who comes hears 503.

    The first SIGTERM or SIGINT begins the end: it waits for what runs, at most ``grace_s``. The
    second ends the process at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        grace_s: float,
        ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._lifecycle, self._grace_s = lifecycle, grace_s
        self._asked_at = 0.0
        self._ends_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hear a signal."""
        now = time.monotonic()
        if not self._lifecycle.ending:
            self._lifecycle.ending, self._asked_at = True, now
        elif sig != signal.SIGINT or now - self._asked_at > SAME_CTRL_C_S:
            sys.stderr.write("ended at once by a second signal\n")
            sys.stderr.flush()
            os._exit(128 + sig)

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether to leave."""
        if self._lifecycle.ending and self._ends_at is None:
            self._ends_at = time.monotonic() + self._grace_s
            _log.info("ending: waiting for %d running requests, at most %g s",
                      self._lifecycle.num_running, self._grace_s)  # fmt: skip
        if self._ends_at is not None:
            if self._lifecycle.num_running == 0:
                return True
            if time.monotonic() > self._ends_at + _CUT_S:
                return True
            if time.monotonic() > self._ends_at and not self._lifecycle.cut_off:
                _log.warning("ending: %d requests are cut off", self._lifecycle.num_running)
                self._lifecycle.cut()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Listen to signals; unlike uvicorn's own, a graceful end is no death by a signal."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def make_server(
    app: Any,
    settings: ServerSettings,
    lifecycle: Lifecycle,
    ready: Callable[[], None] | None = None,
) -> GracefulServer:
    """Return a server of an app of ours, with guards against clients that hang or drip."""
    config = uvicorn.Config(
        app,
        http=guarded_protocol(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # what a client says of its address is not believed
        timeout_keep_alive=max(1, int(settings.head_timeout_s)),
        timeout_graceful_shutdown=_CLOSING_S,
        h11_max_incomplete_event_size=_LONGEST_HEADER,
    )
    return GracefulServer(config, lifecycle, settings.grace_s, ready)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; who comes waits until it is served.

    It listens at once: two that are bound only may have one port on Linux.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, number)
        try:
            if os.name == "posix":  # elsewhere it lets others take the port away
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen()
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host={host} port={port} cannot be served: {error}; give another --port, or a host "
            "of this machine"
        ) from error
    return found


def run(
    app: Any, serving: Serving, listener: socket.socket, ready: Callable[[], None] | None = None
) -> None:
    """Serve until a signal ends it; returns when everything is closed.

    Args:
        app: of :func:`vipllava.serve.app.build_app`, and what is mounted in it.
        serving: what it serves, ``app.state.serving``.
        listener: see :func:`bind`.
        ready: is called when requests are answered.

    Raises:
        VipLlavaError: a model does not start.
    """
    # Of broken images; a request's answer says what of it matters.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    server = make_server(app, serving.settings, serving.lifecycle, ready)

    async def serve() -> None:
        try:
            await serving.start()
        except BaseException:
            await serving.close()
            raise
        await server.serve([listener])

    asyncio.run(serve())
