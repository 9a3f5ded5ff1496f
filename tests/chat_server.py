"""A real server of chat completions on loopback that answers well, slowly, partly or wrongly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

QUICK = {"retry-after-ms": "1"}  # else the client waits half a second before its second attempt


def completion(text: str | None, finish_reason: str | None = "stop", **message: Any) -> bytes:
    """The body of a whole reply."""
    said = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "finish_reason": finish_reason, "message": said}
    whole = {
        "id": "c", "object": "chat.completion", "created": 0, "model": "toy-1", "choices": [choice],
        "system_fingerprint": "fp_1",
    }  # fmt: skip
    return json.dumps(whole).encode()


@dataclass(frozen=True)
class Bad:
    """How one request is answered wrongly.

    Attributes:
        status: of the response.
        body: its body; None is what a good answer would have.
        headers: further headers.
        hold_s: seconds before anything is sent.
        drip_s: seconds before each byte of the body.
        cut: whether half of the body is sent, of the length that is announced.
        type: of the content.
    """

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=lambda: dict(QUICK))
    hold_s: float = 0.0
    drip_s: float = 0.0
    cut: bool = False
    type: str = "application/json"


@dataclass(frozen=True)
class Events:
    """A streamed answer.

    Attributes:
        events: bodies of its events; a number is a pause, seconds. Read as they are sent.
        done: whether the stream says so at its end; else it is cut.
    """

    events: Iterable[bytes | float]
    done: bool = True


def chunk(
    text: str | None = None, finish_reason: str | None = None, usage: Any = None, **choice: Any
) -> bytes:
    """The body of an event; with ``usage`` (tokens of prompt and answer) one without a choice."""
    whole: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 0}
    said = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason, **choice}
    whole |= {"model": "toy-1", "choices": [said] if usage is None else []}
    if usage is not None:
        whole["usage"] = {
            "prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)
        }  # fmt: skip
    return json.dumps(whole).encode()


def streamed(*texts: str, finish_reason: str = "stop", usage: Any = (7, 2)) -> Events:
    """A whole answer in pieces."""
    return Events([*map(chunk, texts), chunk(finish_reason=finish_reason), chunk(usage=usage)])


def listed(*models: dict[str, Any]) -> dict[str, Any]:
    """The body of a list of models."""
    data = [{"object": "model", "created": 0, "owned_by": "us", **each} for each in models]
    return {"object": "list", "data": data}


# The first attempts at a question that may go wrong, each of which another attempt mends.
PASSING = (
    Bad(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
    Bad(500, b"<html>oops</html>", type="text/html"),
    Bad(503, b""),
    Bad(hold_s=4.0),
    Bad(cut=True),
    Bad(body=b"<html>Welcome to nginx</html>", type="text/html"),
    Bad(body=b'{"choices": [{"message": {"content": "hal'),
    Bad(body=b'{"choices": []}'),
    Bad(body=b'["choices"]'),
    Bad(body=b'{"error": {"message": "upstream is down", "code": 502}}'),
    Bad(body=completion("The answer beg", "error")),
)


@dataclass
class ChatServer:
    """How it answers, and what it was asked.

    Attributes:
        address: up to ``/v1``.
        answer: the body of the answer to a request's body, its events, or how it goes wrong.
        asked: the bodies of the requests, in the order that they came.
        headers: of the requests, their names in lower case.
        models: what is listed, as its JSON; None is no such list.
        left: texts of the requests whose client was gone before their last event.
    """

    address: str = ""
    answer: Callable[[dict[str, Any]], bytes | Bad | Events] = lambda body: completion("yes")
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    models: Any = None
    left: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """The last message's text of each request."""
        return [text_of(body) for body in self.asked]


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def has_image(body: dict[str, Any]) -> bool:
    return any(isinstance(message["content"], list) for message in body["messages"])


def wrong_at_first(
    good: Callable[[dict[str, Any]], bytes], wrong: dict[str, list[Bad]]
) -> Callable[[dict[str, Any]], bytes | Bad]:
    """Answer each text wrongly as often as it is listed, then well."""
    left = {text: list(bad) for text, bad in wrong.items()}

    def answer(body: dict[str, Any]) -> bytes | Bad:
        bad = left.get(text_of(body))
        return bad.pop(0) if bad else good(body)

    return answer


@contextmanager
def run_chat_server() -> Iterator[ChatServer]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    state = ChatServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self.reply(Bad(404, b'{"detail": "Not Found"}', {}))
            with lock:
                state.asked.append(body)
                state.headers.append({name.lower(): each for name, each in self.headers.items()})
                found = state.answer(body)
            if isinstance(found, Events):
                return self.stream(found, text_of(body))
            self.reply(Bad(body=found, headers={}) if isinstance(found, bytes) else found)
            return None

        def do_GET(self) -> None:
            if self.path == "/v1/models" and state.models is not None:
                self.reply(Bad(body=json.dumps(state.models).encode(), headers={}))
            else:
                self.reply(Bad(404, b'{"detail": "Not Found"}', {}))

        def stream(self, answer: Events, text: str) -> None:
            self.close_connection = True  # its end is the end of the connection
            try:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in answer.events:
                    if isinstance(event, bytes):
                        self.send_chunk(b"data: " + event + b"\n\n")
                    else:
                        time.sleep(event)
                if answer.done:
                    self.send_chunk(b"data: [DONE]\n\n")
                    self.send_chunk(b"")
            except OSError:
                state.left.append(text)

        def send_chunk(self, body: bytes) -> None:
            self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")

        def reply(self, reply: Bad) -> None:
            time.sleep(reply.hold_s)
            body = completion("cut") if reply.body is None else reply.body
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", reply.type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if reply.cut:
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                elif reply.drip_s:
                    for number in range(len(body)):
                        time.sleep(reply.drip_s)
                        self.wfile.write(body[number : number + 1])
                else:
                    self.wfile.write(body)
            except OSError:  # the client has left
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # the client has left
    state.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("no_proxy", "127.0.0.1")  # a machine's proxy has no part in this
            yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
