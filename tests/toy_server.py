"""An ASGI app on a free port of the loopback, in a thread, as `vipllava serve` would run it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vipllava.serve.lifecycle import Lifecycle
from vipllava.serve.server import GracefulServer, bind, make_server
from vipllava.serve.settings import ServerSettings

_STARTS_S = 60.0
_ENDS_S = 20.0
_WAITS_S = 20.0


def wait_for(truth: Callable[[], object]) -> None:
    """Wait until something holds; fail if it does not within a long time."""
    until = time.monotonic() + _WAITS_S
    while not truth():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.005)


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events; its `[DONE]` must be the last one."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass
class ToyServer:
    """A server that runs."""

    port: int
    server: GracefulServer
    thread: threading.Thread
    headers: dict[str, str] = field(default_factory=dict)  # of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Reply:
        """Send one request; a body that is not bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = dict(self.headers)
        if body is not None:
            sent["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, body, sent | dict(headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("POST", path, body, headers)

    def chat(self, *, headers: Mapping[str, str] | None = None, **body: Any) -> Reply:
        return self.post("/v1/chat/completions", body, headers)


@contextmanager
def run_app(app: Any, settings: ServerSettings | None = None) -> Iterator[ToyServer]:
    """Serve until the block ends; the server's thread has ended then.

    Args:
        app: of :func:`vipllava.serve.app.build_app`, whatever is mounted in it, or any other.
        settings: the app's own; host and port are a free one of the loopback.
    """
    serving = getattr(getattr(app, "state", None), "serving", None)
    settings = settings or (serving.settings if serving else ServerSettings())
    lifecycle = serving.lifecycle if serving else Lifecycle()
    listener = bind("127.0.0.1", 0)
    server = make_server(app, settings, lifecycle)
    thread = threading.Thread(target=server.run, args=([listener],), name="toy-server")
    thread.start()
    try:
        until = time.monotonic() + _STARTS_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.005)
        yield ToyServer(listener.getsockname()[1], server, thread)
    finally:
        server.should_exit = True
        thread.join(_ENDS_S)
        listener.close()
        assert not thread.is_alive(), "the server does not end"
