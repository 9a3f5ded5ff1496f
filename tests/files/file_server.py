"""A real HTTP server on loopback that serves files well, slowly, partly or not at all."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    Attributes:
        status: of an error; 200 serves the file (or the range that is asked for).
        send: bytes of the body that are sent before the connection is closed; None: all.
        claim: the Content-Length that is announced; None: the true one; -1: none at all.
        hold_s: seconds before anything is sent at all.
        wait_s: seconds before each piece of the body but the first.
        pieces: how many those are.
        headers: further headers.
    """

    status: int = 200
    send: int | None = None
    claim: int | None = None
    hold_s: float = 0.0
    wait_s: float = 0.0
    pieces: int = 2
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FileServer:
    """Files by path, and how the next requests of a path are answered.

    Attributes:
        replies: taken from the front, one a request; when none is left all goes well.
        always: the answer of every further request of a path.
        ranges: whether Range is understood.
        validators: whether files have an ETag.
        headers: sent with every file.
        requests: (path, Range header or None) as they came.
        logins: the Authorization header of each request.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    always: dict[str, Reply] = field(default_factory=dict)
    ranges: bool = True
    validators: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"

    def serve(self, path: str, body: bytes, *replies: Reply, always: Reply | None = None) -> str:
        """Offer a file and return its address."""
        self.files[path] = body
        self.replies[path] = list(replies)
        if always is not None:
            self.always[path] = always
        return self.url(path)

    def headers_of(self, body: bytes) -> dict[str, str]:
        """The headers of a whole file."""
        etag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'} if self.validators else {}
        return {"Content-Length": str(len(body)), **etag, **self.headers}

    def asked(self, path: str) -> list[str | None]:
        """The Range headers of the requests of one path."""
        return [asked for name, asked in self.requests if name == path]


@contextmanager
def run_server() -> Iterator[FileServer]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    state = FileServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            body = state.files.get(path)
            reply = state.always.get(path, Reply())
            self.send_response(404 if body is None else reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            for name, value in state.headers_of(body or b"").items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            asked = self.headers.get("Range")
            with lock:
                state.requests.append((path, asked))
                state.logins.append(self.headers.get("Authorization"))
                queue = state.replies.get(path, [])
                reply = queue.pop(0) if queue else state.always.get(path, Reply())
            time.sleep(reply.hold_s)
            body = state.files.get(path)
            if body is None or reply.status != 200:
                self.send_response(404 if body is None else reply.status)
                for name, value in {"Content-Length": "0", **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            self.send_file(body, asked, reply)

        def send_file(self, body: bytes, asked: str | None, reply: Reply) -> None:
            headers = state.headers_of(body)
            start, total = 0, len(body)
            if (
                asked
                and state.ranges
                and self.headers.get("If-Range") in (None, headers.get("ETag"))
            ):
                start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1))  # type: ignore[union-attr]
                if start >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            rest = body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            headers["Content-Length"] = str(len(rest) if reply.claim is None else reply.claim)
            if reply.claim == -1:
                del headers["Content-Length"]
            for name, value in {**headers, **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            sent = rest[: reply.send] if reply.send is not None else rest
            ends = [len(sent) * number // reply.pieces for number in range(reply.pieces + 1)]
            try:
                for begin, end in pairwise(ends):
                    if begin:
                        time.sleep(reply.wait_s)
                    self.wfile.write(sent[begin:end])
            except OSError:  # the client has left
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
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
