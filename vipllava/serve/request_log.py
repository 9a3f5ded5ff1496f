"""A line of JSON for each request: ids, times and tokens, never a key and never what was said."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vipllava.inference.protocol import Usage
from vipllava.serve.errors import ApiError, json_bytes
from vipllava.serve.metrics import Metrics
from vipllava.serve.settings import ServerSettings

LOG: Final = logging.getLogger("vipllava.serve.requests")
"""Its lines are JSON objects as they stand: give it a handler of its own that adds nothing."""
CLIENT_LEFT: Final = 499
"""In log and metrics, the status of a request whose client did not wait."""
_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH: Final = 200
_PROBES: Final = ("/health", "/ready", "/metrics")
_faults = logging.getLogger(__name__)


@dataclass(slots=True)
class Note:
    """What becomes known of a request while it is answered."""

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    model: str | None = None  # one that is served: never what a client made up
    stream: bool = False
    first_token_s: float | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None  # its code
    status: int | None = None  # of the answer, where it is another than HTTP's

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return time.monotonic() - self.started_at


class RequestLog:
    """Gives requests their ids, logs and counts them, and answers what nobody else does.

    The outermost layer of an app: an error that is nobody's becomes a 500 in OpenAI's form, with
    its traceback in the log of this process only.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        note = scope.setdefault("state", {})["note"] = Note(request_id)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode())],
                }
            await send(message)

        try:
            host = headers.get(b"host", b"").decode("latin-1")
            if not self._settings.knows_host(host):
                raise ApiError(
                    421, f"Host is {host[:100]!r}, by which this server is not known: start it "
                    "with --allow-host", code="unknown_host",
                )  # fmt: skip
            await self._app(scope, receive, send_on)
        except ClientDisconnect:
            note.status = CLIENT_LEFT
        except Exception as error:
            if status:
                raise
            if not isinstance(error, ApiError):
                _faults.exception("request %s failed: a defect of this server", request_id)
                error = ApiError(500, f"a defect of this server; its log has more of request "
                                 f"{request_id}", code="internal_error")  # fmt: skip
            note.error = error.code
            await _send_error(error, send_on)
        finally:
            self._finish(scope, note, note.status or status or CLIENT_LEFT)

    def _finish(self, scope: Scope, note: Note, status: int) -> None:
        is_quiet = scope["path"] in _PROBES and status < 400
        level = logging.DEBUG if is_quiet else logging.INFO
        if LOG.isEnabledFor(level):
            LOG.log(level, "%s", json.dumps(_fields(scope, note, status), ensure_ascii=True))
        model = note.model or ""
        route = getattr(scope.get("route"), "path", "other")  # not what a client made up
        self._metrics.requests.labels(model, route, str(status)).inc()
        if status >= 400 and note.error:
            self._metrics.rejected.labels(model, note.error).inc()
        if note.finish_reason is not None:
            self._metrics.latency.labels(model).observe(note.seconds)
            if note.first_token_s is not None:
                self._metrics.first_token.labels(model).observe(note.first_token_s)
            if note.usage is not None:
                self._metrics.prompt_tokens.labels(model).inc(note.usage.prompt_tokens)
                self._metrics.completion_tokens.labels(model).inc(note.usage.completion_tokens)


def _fields(scope: Scope, note: Note, status: int) -> dict[str, Any]:
    client = scope.get("client")
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": note.request_id,
        "client": client[0] if client else None,
        "method": scope["method"][:_LONGEST_PATH],
        "path": scope["path"][:_LONGEST_PATH],
        "status": status,
        "seconds": round(note.seconds, 4),
    }
    optional: dict[str, Any] = {
        "model": note.model,
        "stream": note.stream or None,
        "first_token_s": None if note.first_token_s is None else round(note.first_token_s, 4),
        "prompt_tokens": note.usage and note.usage.prompt_tokens,
        "completion_tokens": note.usage and note.usage.completion_tokens,
        "finish_reason": note.finish_reason,
        "error": note.error,
    }
    return found | {name: value for name, value in optional.items() if value is not None}


async def _send_error(error: ApiError, send: Send) -> None:
    body = json_bytes(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    raw = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
