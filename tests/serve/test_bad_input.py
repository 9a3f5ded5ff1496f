"""Bad requests: a status, the field and the reason; nobody else suffers."""

from __future__ import annotations

import base64
import json
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine, data_uri, encoded, picture, question
from tests.toy_server import Reply, run_app, wait_for
from vipllava.inference.protocol import PromptTooLong, SamplingError
from vipllava.serve import conversation, schema
from vipllava.serve.app import build_app
from vipllava.serve.errors import ApiError
from vipllava.serve.limits import MOST_NAMES, MOST_OF_OBJECT, MOST_VALUES
from vipllava.serve.settings import ServerSettings
from vipllava.types import RecordError

SMALL = data_uri(picture())
TYPE = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
FINE: dict[str, Any] = {"model": "toy", "messages": [question("What is {0}?", SMALL)]}


@pytest.fixture(scope="module")
def toy():
    engine = FakeEngine()
    app = build_app({"toy": engine}, ServerSettings(max_body_mb=2, max_pixels=10_000))
    with run_app(app) as server:
        yield Served(server, engine, app.state.serving)


@pytest.fixture(autouse=True)
def nothing_is_asked(toy: Served):
    toy.engine.asked.clear()


def refused(reply: Reply, status: int, param: str | None, *words: str) -> None:
    error = reply.error
    assert (reply.status, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"]
    for word in words:
        assert word in error["message"], error


@pytest.mark.parametrize(
    ("change", "param", "word"),
    [
        ({"model": None}, "model", "string"),
        ({"messages": []}, "messages", "1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"content": "?"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "tool", "content": "?"}]}, "messages[0]", "assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]", "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text", "string",
        ),
        (
            {"messages": [{"role": "assistant", "content": "?"}, question("?")]},
            "messages[0].role", "user",
        ),
        ({"messages": [question("?"), question("?")]}, "messages[1].role", "assistant"),
        (
            {"messages": [question("?"), {"role": "assistant", "content": "!"}]},
            "messages[1].role", "user",
        ),
        (
            {"messages": [question("?", SMALL), {"role": "assistant", "content": "!"},
                          question("?", SMALL)]},
            "messages[2].content[0].image_url.url", "one",
        ),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": "9"}, "max_tokens", "`max_tokens` is '9': expected a valid integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "4"),
        ({"temperature": -1}, "temperature", "0"),
        ({"top_p": 0}, "top_p", "0"),
        ({"n": 2}, "n", "`n` is 2: one answer is given; leave it out, or 1"),
        ({"stop": [""]}, "stop[0]", "1"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"seed": 2**63}, "seed", "9223372036854775807"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0"),
        (
            {"tools": [{"type": "function"}]}, "tools",
            "these models call no tools; leave it out",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
        ({"max_new_tokens": 5}, "max_new_tokens", "`max_tokens`"),
        ({"region": []}, "region", "`regions`"),
        ({"zzzzzz": 5}, "zzzzzz", "leave it out"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use", "usage"),
    ],
)  # fmt: skip
def test_fields(change: dict[str, Any], param: str, word: str, toy: Served):
    refused(toy.http.chat(**FINE | change), 400, param, word)
    assert not toy.engine.asked


BOX = {"shape": "rectangle", "box": [1, 1, 9, 9]}


@pytest.mark.parametrize(
    ("regions", "param"),
    [
        ({}, "regions"),
        ("red", "regions"),
        ([3], "regions[0]"),
        ([BOX, {"shape": "rectangle"}], "regions[1].box"),
        ([BOX, BOX, {"shape": "circle", "box": [1, 1, 9, 9]}], "regions[2].shape"),
        ([BOX | {"box": [1, 1, 9]}], "regions[0].box"),
        ([BOX | {"box": [100, 100, 120, 120]}], "regions[0].box"),
        ([BOX | {"box": [9, 9, 1, 1]}], "regions[0].box"),
        ([BOX | {"box": [1, 1, 9, "9"]}], "regions[0].box"),
        ([BOX | {"colour": "pink"}], "regions[0].colour"),
        ([BOX | {"alpha": 0}], "regions[0].alpha"),
        ([BOX | {"width": 1.5}], "regions[0].width"),
        ([BOX | {"colr": "red"}], "regions[0].colr"),
        ([BOX | {"image": 1}], "regions[0].image"),
        ([{"shape": "mask", "rle": {"size": [1, 1], "counts": [1]}}], "regions[0].rle.size"),
        ([{"shape": "mask", "rle": {"size": [30, 40], "counts": "~~~"}}], "regions[0].rle.counts"),
        ([BOX] * 10_000, "regions"),
    ],
)
def test_regions(regions: Any, param: str, toy: Served):
    refused(toy.http.chat(**FINE, regions=regions), 400, param)
    preview = toy.http.post("/v1/regions/preview", {"image": SMALL, "regions": regions})
    refused(preview, 400, param)
    assert not toy.engine.asked


def test_drawing_that_would_take_minutes(serve: Callable[..., Served]):
    served = serve()
    large = data_uri(picture((6000, 4000)))
    zigzag = [[x % 2 * 5900 + 1, x % 3 * 1900 + 1] for x in range(5000)]
    mask = {"size": [4000, 6000], "counts": [12_000_000, 12_000_000]}
    everywhere = {"box": [0, 0, 6000, 4000]}
    for heavy in (
        [{"shape": "mask contour", "polygon": zigzag, "width": 10_000}],
        [{"shape": "mask", "polygon": zigzag}] * 4,
        [{"shape": "scribble", "stroke": zigzag, "width": 900}],
        [{"shape": "mask", "rle": mask}] * 30,
        [{"shape": "ellipse", **everywhere, "width": 50}] * 100,
    ):
        body = {"image": large, "regions": heavy}
        refused(served.http.post("/v1/regions/preview", body), 400, "regions", "times")
    fine = [{"shape": "ellipse", **everywhere}, {"shape": "mask", "rle": mask}, BOX]
    body = {"image": large, "regions": fine}
    assert served.http.post("/v1/regions/preview", body).status == 200


def test_mentions(toy: Served):
    refused(
        toy.http.chat(**FINE, regions=[BOX | {"colour": "red"}] * 2),
        400,
        "messages",
        "{0}",
        "colour",
    )
    one = FINE | {"messages": [question("What is {3}?", SMALL)], "regions": [BOX]}
    refused(toy.http.chat(**one), 400, "messages", "{3}")
    for url in (SMALL, None):
        none = {"model": "toy", "messages": [question("What is {0}?", url)], "regions": []}
        refused(toy.http.chat(**none), 400, "messages", "{0}", "nothing is marked")
    text = {"model": "toy", "messages": [question("What is {0}?")]}
    refused(toy.http.chat(**text, regions=[BOX]), 400, "regions", "image")
    refused(toy.http.chat(**text, overlay=True), 400, "overlay", "image")


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large; its pixels, all zero, take few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", ["data:image"]),
        ("/etc/passwd", ["data:image"]),
        ("../secret.png", ["data:image"]),
        ("ftp://example.org/a.png", ["data:image"]),
        ("https://example.org/a.png", ["--allow-image-urls"]),
        ("HTTP://127.0.0.1:1/a.png", ["--allow-image-urls"]),
        ("data:text/html;base64,AAAA", ["data:image"]),
        ("data:image/png,AAAA", ["data:image"]),
        ("data:image/png;base64,A*AA", ["base64"]),
        ("data:image/png;base64,AAAAA", ["base64"]),
        ("data:image/png;base64,ÄÖ", ["base64"]),
        ("data:image/png;base64,", ["0 bytes"]),
        ("data:image/svg+xml;base64,PHN2Zz4=", ["JPEG"]),
        (uri(b"GIF89a" + bytes(20)), ["JPEG, PNG or WebP"]),
        (uri(encoded(picture(), "BMP")), ["JPEG, PNG or WebP"]),
        (uri(b"\x89PNG\r\n\x1a\n"), ["url"]),
        (uri(encoded(picture())[:-30]), ["url"]),
        (uri(encoded(picture(), "JPEG")[:60]), ["url"]),
        (uri(b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(9)), ["url"]),
        (uri(bomb(101, 100)), ["101 x 100", "10000"]),
        (uri(bomb(60_000, 60_000)), ["3600000000"]),
        (uri(bomb(2**31 - 1, 2**31 - 1)), ["url"]),
        (uri(bomb(0, 10)), ["url"]),
    ],
)
def test_images(url: str, words: list[str], toy: Served):
    where = "messages[0].content[0].image_url.url"
    refused(toy.http.chat(model="toy", messages=[question("?", url)]), 400, where, *words)
    assert not toy.engine.asked
    assert toy.serving.memory.free == toy.serving.memory.size
    refused(toy.http.post("/v1/regions/preview", {"image": url}), 400, "image")
    assert toy.serving.memory.free == toy.serving.memory.size


def names(count: int) -> bytes:
    """An object of as many names, which no request has."""
    return json.dumps({f"k{number}": 1 for number in range(count)}).encode()


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"null", "object"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"metadata": {"\\uDFFF": 1}}', "surrogate"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b'{"metadata": {"a": 1, "a": 2}}', "twice"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "beyond"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 40_000, "deep"),
        (b"[" + b"1," * (MOST_VALUES - 1) + b"1]", "object"),
        (b"[" + b"1," * MOST_VALUES + b"1]", str(MOST_VALUES)),
        (names(MOST_OF_OBJECT + 1), str(MOST_OF_OBJECT)),
        (b"[" + b'{"a": 1},' * (MOST_NAMES // 2) + b"1]", "object"),
        (names(MOST_NAMES + 1), str(MOST_NAMES)),
        (b'{"regions": [' + b"[]," * (MOST_VALUES // 2) + b"[]]}", str(MOST_VALUES)),
    ],
)
def test_bodies(body: bytes, word: str, toy: Served):
    for path in (CHAT, "/v1/regions/preview"):
        found = toy.http.post(path, body)
        refused(found, 400, None, word)


def test_few_errors_are_built_of_many(monkeypatch: pytest.MonkeyPatch):
    built: list[int] = []
    refuse = schema._refused

    def count(problems: list[Any], kind: Any) -> Any:
        built.append(len(problems))
        return refuse(problems, kind)

    monkeypatch.setattr(schema, "_refused", count)
    wrong = {f"k{number}": 1 for number in range(90)}
    part = {"type": "text", **wrong}
    for messages in (
        [question("?") | wrong] * 500,
        [{"role": "user", "content": [part] * 60}] * 5,
        [3] * 1000,
    ):
        with pytest.raises(ApiError) as refused:
            schema.parse(schema.ChatRequest, {"model": "toy", "messages": messages})
        assert str(refused.value.param).startswith("messages[0]")
    assert max(built) <= 92


@pytest.mark.parametrize("path", [CHAT, "/v1/regions/preview"])
def test_large_bodies_are_read_beside_the_event_loop(
    path: str, toy: Served, monkeypatch: pytest.MonkeyPatch
):
    begun, go_on = threading.Event(), threading.Event()
    marks = conversation.parse_marks

    def wait(value: object) -> Any:
        begun.set()
        assert go_on.wait(20)
        return marks(value)

    monkeypatch.setattr(conversation, "parse_marks", wait)
    ring = [[number % 40, number % 30] for number in range(20_000)]
    regions = [{"shape": "mask", "polygon": ring}]
    body = FINE | {"regions": regions} if path == CHAT else {"image": SMALL, "regions": regions}
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(toy.http.post, path, body)
        assert begun.wait(20)
        assert toy.http.get("/health").status == 200
        go_on.set()
        assert found.result().status == 200


def test_content_types(toy: Served):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        found = toy.http.post(CHAT, json.dumps(FINE).encode(), {"Content-Type": kind})
        refused(found, 415, None, "application/json")
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert toy.http.post(CHAT, json.dumps(FINE).encode(), kind).status == 200


def test_large_bodies(toy: Served):
    refused(toy.http.post(CHAT, b" " * 2_000_001), 413, None, "2 MB")
    found = toy.http.ask("POST", CHAT, None, TYPE | {"Content-Length": "99999999999"})
    refused(found, 413, None, "2 MB")

    def chunks():
        for _ in range(60):
            yield b" " * 50_000

    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", toy.http.port, timeout=30)
    connection.request("POST", CHAT, chunks(), TYPE,
                       encode_chunked=True)  # fmt: skip
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (413, "close")
    connection.close()
    assert toy.serving.memory.free == toy.serving.memory.size


def test_unknown_places(toy: Served):
    found = toy.http.get("/v1/embeddings")
    assert (found.status, found.error["code"]) == (404, "not_found")
    found = toy.http.get(CHAT)
    assert (found.status, found.error["code"]) == (405, "method_not_allowed")
    assert found.headers["allow"] == "POST"
    for path in ("/docs", "/redoc", "/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd"):
        assert toy.http.get(path).status == 404


def test_what_engines_say(serve: Callable[..., Served]):
    served = serve()
    body = {"model": "toy", "messages": [question("?")]}
    for fault, status, param in (
        (PromptTooLong("700 tokens with 512 positions"), 400, "messages"),
        (PromptTooLong("max_new_tokens=9: lower it", room=5), 400, "max_tokens"),
        (SamplingError("max_new_tokens", 5, "less"), 400, "max_tokens"),
        (RecordError("a stage-1 model is asked without an image"), 400, "messages"),
    ):
        served.engine.fault = fault
        for stream in (False, True):  # before the first text, so with a status
            said = str(fault).replace("max_new_tokens", "max_tokens")
            refused(served.http.chat(**body, stream=stream), status, param, said)


def test_a_long_text_is_refused_before_it_is_tokenised(toy: Served):
    found = toy.http.chat(model="toy", messages=[question("a" * 33_000)])
    refused(found, 400, "messages", "33000", "512")


def test_defects_are_500_and_say_nothing(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
):
    served = serve()
    served.engine.raises = KeyError("secret")
    found = served.http.chat(model="toy", messages=[question("?")])
    refused(found, 500, None)
    assert b"secret" not in found.body
    assert "secret" in caplog.text
    assert served.http.get("/ready").status == 503
    served.engine.raises = None
    assert served.http.chat(model="toy", messages=[question("?")]).status == 200


def test_addresses_where_they_are_allowed(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    served = serve(allow_image_urls=True)
    where = "messages[0].content[0].image_url.url"
    for private in ("http://127.0.0.1:1/a.png", "http://169.254.169.254/latest", "http://[::1]/a"):
        found = served.http.chat(model="toy", messages=[question("?", private)])
        refused(found, 400, where)
        assert found.error["code"] == "image_url"
    asked: list[tuple[str, int]] = []

    def fetch(url: str, most: int) -> bytes:
        asked.append((url, most))
        return encoded(picture())

    monkeypatch.setattr("vipllava.serve.pictures.fetch_public", fetch)
    public = "https://example.org/a.png"
    assert served.http.chat(model="toy", messages=[question("?", public)]).status == 200
    assert asked == [(public, 32_000_000)]
    assert served.engine.asked[-1].request.image is not None
    wait_for(lambda: served.serving.memory.free == served.serving.memory.size)
