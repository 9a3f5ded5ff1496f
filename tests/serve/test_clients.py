"""Clients that leave, drip, do not read or come in crowds: the others do not notice."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine, data_uri, picture, question
from tests.toy_server import ToyServer, wait_for
from vipllava.serve import bodies

WAITS_S = 20.0


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": [question(text)], **more}


def connect(server: ToyServer, head: bytes) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port), timeout=WAITS_S)
    found.sendall(head)
    return found


def read_until(connection: socket.socket, wanted: bytes) -> None:
    found = b""
    while wanted not in found:
        data = connection.recv(10_000)
        assert data, found
        found += data


def chat_bytes(text: str, **more: Any) -> bytes:
    content = json.dumps(body(text, **more)).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )


def is_idle(served: Served) -> bool:
    admission, memory = served.serving.models["toy"].admission, served.serving.memory
    return (
        (admission.admitted, admission.running, served.serving.lifecycle.num_running) == (0, 0, 0)
        and memory.free == memory.size
        and not served.engine.running
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["hold", "holdfirst"])
def test_a_client_that_leaves_ends_its_request(
    stream: bool, text: str, serve: Callable[..., Served]
):
    served = serve()
    left = connect(served.http, chat_bytes(text, stream=stream))
    wait_for(lambda: served.engine.running)
    if stream and text == "hold":
        read_until(left, b"The ")
    left.close()
    wait_for(lambda: is_idle(served))
    assert served.engine.left == [served.engine.asked[0].request.key]
    assert served.http.chat(**body("?")).status == 200
    assert b'status="499"} 1.0' in served.http.get("/metrics").body


def test_a_client_that_leaves_while_it_waits_is_never_asked_for(serve: Callable[..., Served]):
    served = serve(max_running=1)
    first = connect(served.http, chat_bytes("hold"))
    wait_for(lambda: served.engine.running)
    second = connect(served.http, chat_bytes("never"))
    wait_for(lambda: served.serving.models["toy"].admission.waiting)
    second.close()
    wait_for(lambda: not served.serving.models["toy"].admission.waiting)
    served.engine.released.set()
    read_until(first, b"red.")
    first.close()
    wait_for(lambda: is_idle(served))
    assert len(served.engine.asked) == 1


def test_too_many_hear_so_at_once(serve: Callable[..., Served]):
    served = serve(max_running=2, max_queue=1)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(served.http.chat, **body("hold")) for _ in range(3)]
        admission = served.serving.models["toy"].admission
        wait_for(lambda: admission.admitted == 3 and admission.running == 2)
        for stream in (False, True):
            refused = served.http.chat(**body("?", stream=stream))
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        text = served.http.get("/metrics").body.decode()
        assert 'vipllava_waiting{model="toy"} 1.0' in text
        assert 'vipllava_rejected_total{model="toy",reason="queue_full"} 2.0' in text
        served.engine.released.set()
        assert [each.result().status for each in waiting] == [200] * 3
    assert served.engine.most_running == 2


def test_fifty_at_once_beside_one_that_hangs(serve: Callable[..., Served]):
    served = serve(max_running=8, max_queue=64)
    hanging = connect(served.http, chat_bytes("hold", stream=True))
    wait_for(lambda: served.engine.running)

    def ask(number: int) -> list[str]:
        more = {"stream": True} if number % 2 else {}
        said = question(f"number {number} {{0}}", data_uri(picture((40 + number, 30))))
        mark = {"shape": "rectangle", "box": [1, 1, 9, 9], "colour": "red"}
        reply = served.http.chat(model="toy", messages=[said], regions=[mark], **more)
        assert reply.status == 200
        if number % 2:
            pieces = [event["choices"][0]["delta"] for event in reply.events]
            return ["".join(piece.get("content", "") for piece in pieces)]
        return [reply.json["choices"][0]["message"]["content"]]

    served.engine.pieces = lambda asked: [asked.request.turns[0].text, " yes"]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, range(50)))
    assert found == [[f"number {n} within the red rectangle yes"] for n in range(50)]
    assert served.engine.most_running <= 8
    hanging.close()
    wait_for(lambda: is_idle(served))


@pytest.mark.parametrize("stream", [False, True])
def test_deadlines(stream: bool, serve: Callable[..., Served]):
    served = serve(deadline_s=0.3)
    early = served.http.chat(**body("holdfirst", stream=stream))
    assert (early.status, early.error["code"]) == (504, "deadline_exceeded")
    late = served.http.chat(**body("hold", stream=stream))
    if stream:
        assert late.status == 200
        *_, piece, error = late.events
        assert piece["choices"][0]["delta"] == {"content": "The "}
        assert error["error"]["code"] == "deadline_exceeded"
    else:
        assert late.status == 504
    wait_for(lambda: is_idle(served))
    assert len(served.engine.left) == 2


def ends(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection, which it must."""
    found = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(100_000):
            found += data
    connection.close()
    return found


def drip(connection: socket.socket, data: bytes) -> threading.Thread:
    def send() -> None:
        with suppress(OSError):
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_dripping_headers_end(serve: Callable[..., Served]):
    served = serve(head_timeout_s=0.5)
    silent = connect(served.http, b"")
    dripping = connect(served.http, b"GET /health HTTP/1.1\r\n")
    thread = drip(dripping, b"X-A: b\r\n" * 50)
    again = connect(served.http, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_until(again, b'{"status":"ok"}')
    second = drip(again, b"GET /health HTTP/1.1\r\nX-A: " + b"b" * 100)
    assert served.http.get("/health").status == 200
    assert ends(silent) == ends(dripping) == ends(again) == b""
    thread.join()
    second.join()
    wait_for(lambda: not served.http.server.server_state.connections)


@pytest.mark.parametrize("chunked", [False, True])
def test_dripping_bodies_end(chunked: bool, serve: Callable[..., Served]):
    served = serve(body_timeout_s=0.5, head_timeout_s=0.3)
    head, _, content = chat_bytes("?").partition(b"\r\n\r\n")
    if chunked:
        head = head.rpartition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked"
        content = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    connection = connect(served.http, head + b"\r\n\r\n")
    thread = drip(connection, content)
    assert served.http.chat(**body("?")).status == 200
    found = ends(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"body_too_slow" in found
    thread.join()
    wait_for(lambda: is_idle(served))


def test_a_body_that_breaks_off(serve: Callable[..., Served]):
    served = serve()
    connection = connect(served.http, chat_bytes("?")[:-5])
    wait_for(lambda: served.serving.memory.free < served.serving.memory.size)
    connection.close()
    wait_for(lambda: is_idle(served))
    assert not served.engine.asked


def test_bodies_that_hang_hold_no_memory_that_others_need(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bodies, "STALLED_S", 0.0)
    served = serve(max_body_mb=1, picture_memory_mb=4)  # 1 MB for the bodies of one address
    memory = served.serving.memory
    half = chat_bytes("?" * 900_000)[:-400_000]
    hanging = [connect(served.http, half)]
    wait_for(lambda: memory.free < memory.size - 450_000)
    hanging.append(connect(served.http, half))  # the first one is left for it
    assert b"body_too_slow" in ends(hanging[0])
    good = served.http.chat(model="toy", messages=[question("?" + " " * 700_000)])
    assert good.error["code"] == "context_length_exceeded"  # so it was read
    assert b"body_too_slow" in ends(hanging[1])
    wait_for(lambda: is_idle(served))


def test_one_address_holds_a_share_of_the_memory(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bodies, "STALLED_S", 600.0)
    served = serve(max_body_mb=1, picture_memory_mb=4)
    memory = served.serving.memory
    hanging = connect(served.http, chat_bytes("?" * 900_000)[:-100_000])
    wait_for(lambda: memory.free < memory.size - 750_000)
    refused = connect(served.http, chat_bytes("?" * 900_000)[:-100_000])
    assert b"memory_full" in ends(refused)
    assert served.http.chat(**body("?")).status == 200  # small, of the same address
    assert memory.free > memory.size // 2
    hanging.close()
    wait_for(lambda: is_idle(served))


def test_a_client_that_does_not_read_is_left(serve: Callable[..., Served]):
    served = serve(FakeEngine(pieces=lambda asked: ["x" * 100_000] * 300), write_timeout_s=0.5)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", served.http.port))
    slow.sendall(chat_bytes("?", stream=True))
    wait_for(lambda: served.engine.running)
    assert served.http.get("/health").status == 200
    wait_for(lambda: is_idle(served))
    assert len(served.engine.left) == 1
    wait_for(lambda: not served.http.server.server_state.connections)
    slow.close()


def test_connections_are_bounded(serve: Callable[..., Served]):
    served = serve(max_connections=3)
    held = [connect(served.http, b"") for _ in range(3)]
    wait_for(lambda: len(served.http.server.server_state.connections) == 3)
    assert ends(connect(served.http, b"")) == b""
    for each in held:
        each.close()
    wait_for(lambda: not served.http.server.server_state.connections)
    assert served.http.get("/health").status == 200


def test_memory_for_images_is_bounded(serve: Callable[..., Served]):
    served = serve(picture_memory_mb=1)
    image = data_uri(picture((300, 300)))  # 2 x 270 kB
    said = {"model": "toy", "messages": [question("hold", image)]}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.http.chat, **said)
        wait_for(lambda: served.engine.running)
        refused = served.http.chat(**said)
        assert (refused.status, refused.error["code"]) == (429, "memory_full")
        assert refused.headers["retry-after"]
        served.engine.released.set()
        assert first.result().status == 200
    large = {"model": "toy", "messages": [question("?", data_uri(picture((500, 500))))]}
    refused = served.http.chat(**large)
    assert (refused.status, refused.error["code"]) == (413, "request_too_large")
    wait_for(lambda: is_idle(served))
    assert served.http.chat(**said).status == 200
