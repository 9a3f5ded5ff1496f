"""The page's own routes: pictures in memory, plans of marks, bounds."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from vipllava.inference.marked import mark_request
from vipllava.serve.errors import ApiError
from vipllava.serve.limits import Memory
from vipllava.serve.page.examples import Example
from vipllava.serve.page.gate import GradioGate
from vipllava.serve.page.pictures import PictureLimits, PictureStore
from vipllava.serve.page.routes import build_routes
from vipllava.serve.page.work import Lane, PictureWork
from vipllava.types import Turn
from vipllava.visual_prompts.mark_fields import parse_marks

AS_JSON = {"Content-Type": "application/json"}
IMAGE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))


def png(image: Image.Image = IMAGE, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


@pytest.fixture
def store() -> PictureStore:
    return PictureStore(PictureLimits(most_bytes=20_000, most_pixels=2500))


@pytest.fixture
def client(store: PictureStore) -> TestClient:
    app = FastAPI()
    mark = {"shape": "point", "point": [3, 4], "colour": "red"}
    app.include_router(
        build_routes(store, [Example(IMAGE, (mark,), "What is {0}?", "a" * 64)], 0.2)
    )

    gradio = FastAPI()

    @gradio.post("/gradio_api/queue/join")
    async def join(body: dict[str, Any]) -> int:
        return len(json.dumps(body))

    @gradio.get("/{path:path}")
    async def anything(path: str) -> str:
        return path

    app.mount("/", GradioGate(gradio, store.work.memory, 0.2))
    return TestClient(app, headers={"Content-Type": "application/octet-stream"})


def test_a_picture_comes_back_upright_and_without_loss(client: TestClient):
    exif = Image.Exif()
    exif[0x0112] = 6
    reply = client.post("/page/pictures", content=png(exif=exif)).json()
    assert (reply["width"], reply["height"]) == (30, 40)
    shown = client.get(f"/page/pictures/{reply['picture']}")
    assert shown.headers["content-type"] == "image/png"
    upright = IMAGE.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(Image.open(io.BytesIO(shown.content)), upright)


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"", 422, "picture"),
        (b"no picture", 422, "picture"),
        (png()[:200], 422, "decoded"),
        (b"x" * 20_001, 413, "at most 20000 bytes"),
        (png(Image.new("RGB", (60, 60))), 422, "60 x 60 pixels"),
        (png(Image.new("1", (5_000, 5_000))), 422, "pixels"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused(
    client: TestClient, data: bytes, status: int, said: str
):
    reply = client.post("/page/pictures", content=data)
    assert reply.status_code == status
    assert said in reply.json()["detail"]


def test_marks_are_planned_one_by_one(client: TestClient):
    name = client.post("/page/pictures", content=png()).json()["picture"]
    marks = [
        {"shape": "rectangle", "box": [2, 2, 20, 20], "colour": "red"},
        {"shape": "rectangle", "box": [5, 5, 25, 25], "colour": "red"},
        {"shape": "arrow", "stroke": [[1, 1], [30, 20]], "colour": [1, 2, 3]},
    ]
    reply = client.post("/page/plan", json={"picture": name, "marks": marks}).json()
    first, second, third = reply["marks"]
    assert first["words"] == second["words"] == "within the red rectangle"
    assert first["ambiguous"] is True
    assert first["strokes"] == [{"kind": "box", "points": [[2, 2], [20, 20]], "width": 3}]
    assert (third["words"], third["rgb"], third["alpha"]) == (
        "pointed to by the arrow", [1, 2, 3], 128,
    )  # fmt: skip
    drawn = client.get(f"/page/drawn/{reply['drawn']}.png")
    asked = mark_request(IMAGE, [Turn("user", "?")], parse_marks(marks))
    assert np.array_equal(Image.open(io.BytesIO(drawn.content)), asked.overlay)
    assert client.get(f"/page/drawn/{reply['drawn']}/small.jpg").status_code == 200
    again = client.post("/page/plan", json={"picture": name, "marks": marks}).json()
    assert again == reply


def test_a_mark_that_cannot_be_drawn_leaves_the_others(client: TestClient):
    name = client.post("/page/pictures", content=png()).json()["picture"]
    marks = [{"shape": "rectangle", "box": box} for box in ([100, 100, 120, 120], [1, 1, 20, 20])]
    reply = client.post("/page/plan", json={"picture": name, "marks": marks}).json()
    assert reply["drawn"] is None
    assert "inside the image of 40 x 30 pixels" in reply["marks"][0]["error"]
    assert reply["marks"][1]["words"] == "within the red rectangle"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "no JSON"),
        (b"[1]", 400, "no JSON object"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b'{"marks": []}', 410, "no longer here"),
        (b'{"picture": "../../etc/passwd", "marks": []}', 410, "no longer here"),
        (b'{"picture": "NAME", "marks": 3}', 422, "regions"),
        (b'{"picture": "NAME", "marks": [{"shape": "mask", "bocks": [1, 1, 2, 2]}]}', 422, "bocks"),
        (
            b'{"picture": "NAME", "marks": [{"shape": "mask", "box": [1, NaN, 2, 2]}]}',
            422,
            "regions[0].box",
        ),
        (b'{"picture": "NAME", "marks": [' + b"{}," * 10_000 + b"{}]}", 422, "at most 100"),
    ],
)
def test_nonsense_is_refused_in_words(client: TestClient, body: bytes, status: int, said: str):
    name = client.post("/page/pictures", content=png()).json()["picture"]
    reply = client.post("/page/plan", content=body.replace(b"NAME", name.encode()))
    assert reply.status_code == status
    assert said in reply.json()["detail"]


def test_examples(client: TestClient):
    reply = client.post("/page/examples/0").json()
    assert reply["question"] == "What is {0}?"
    assert reply["marks"][0]["shape"] == "point"
    assert client.get("/page/examples/0.jpg").headers["content-type"] == "image/jpeg"
    assert client.post("/page/examples/1").status_code == 404


def test_events_are_bounded_and_files_are_not_taken(client: TestClient):
    assert client.post("/gradio_api/upload", content=b"x").status_code == 404
    assert client.post("/gradio_api/queue/join", json={"a": 1}, headers=AS_JSON).status_code == 200
    reply = client.post("/gradio_api/queue/join", content=b" " * (4 * 2**20 + 1))
    assert reply.status_code == 413


def test_gradio_s_routes_that_no_page_needs_are_not_there(client: TestClient):
    for path in (
        *("deep_link?session_hash=x", "file=/etc/passwd", "file/x", "proxy=http://x", "upload"),
        *("stream/x/1/2/playlist.m3u8", "run-history/records", "vibe-code", "profiling/traces"),
    ):
        assert client.get(f"/gradio_api/{path}").status_code == 404, path
    for path in ("monitoring", "pwa_icon", "login_check", "logout"):
        assert client.get(f"/{path}").status_code == 404, path
    for path in ("upload", "run/ask", "api/ask", "call/ask", "component_server", "stream/x"):
        assert client.post(f"/gradio_api/{path}", json={}).status_code == 404, path
    for path in ("", "config", "theme.css", "assets/x.js", "gradio_api/heartbeat/x"):
        assert client.get(f"/{path}").json() == path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://ours.example", "X-Forwarded-Host": "ours.example"}, 200),
        ({"Content-Type": "image/png"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
def test_other_web_pages_send_nothing(client: TestClient, headers: dict[str, str], status: int):
    assert client.post("/page/pictures", content=png(), headers=headers).status_code == status
    if status == 403:
        for path in ("/page/plan", "/page/examples/0", "/gradio_api/queue/join"):
            assert client.post(path, json={}, headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/page/pictures", "/page/plan", "/gradio_api/queue/join"])
def test_a_body_that_does_not_come_is_not_waited_for(client: TestClient, path: str):
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"",
             "root_path": "", "headers": headers, "http_version": "1.1"}  # fmt: skip
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 20))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_bodies_share_a_bound_of_memory():
    app = FastAPI()
    store = PictureStore(work=PictureWork(Memory(1000)))
    app.include_router(build_routes(store, []))
    client = TestClient(app, headers={"Content-Type": "image/png"})
    assert client.post("/page/pictures", content=b"x" * 1001).status_code == 413
    assert client.post("/page/pictures", content=b"x" * 1000).status_code == 422
    assert store.work.memory.free == 1000


def test_marks_that_take_minutes_to_draw_are_refused(client: TestClient, store: PictureStore):
    name = store.keep(Image.new("RGB", (4000, 4000)), "a" * 64).name
    corners = [[0, 0], [3999, 0], [3999, 3999], [0, 3999]]
    marks = [{"shape": "mask", "polygon": corners}] * 100
    reply = client.post("/page/plan", json={"picture": name, "marks": marks})
    assert reply.status_code == 422
    assert "times what one question may" in reply.json()["detail"]
    assert client.post("/page/plan", json={"picture": name, "marks": marks[:2]}).json()["drawn"]


def test_work_for_clients_that_have_left_is_not_begun():
    begun: list[int] = []

    async def run() -> None:
        work, gate = Lane(2), threading.Event()
        busy = [asyncio.create_task(work.run(gate.wait)) for _ in range(2)]
        left = [asyncio.create_task(work.run(begun.append, n)) for n in range(6)]
        await asyncio.sleep(0)
        stays = asyncio.create_task(work.run(begun.append, 7))
        await asyncio.sleep(0)
        for task in left:
            task.cancel()
        gate.set()
        await asyncio.gather(*busy, stays)
        work.close()

    asyncio.run(run())
    assert begun == [7]


def test_too_many_that_wait_are_told_so():
    async def run() -> None:
        work, gate = Lane(2), threading.Event()
        tasks = [asyncio.create_task(work.run(gate.wait)) for _ in range(66)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="ask again later"):
            await work.run(gate.wait)
        gate.set()
        await asyncio.gather(*tasks)
        work.close()

    asyncio.run(run())


def test_unknown_pictures_are_gone(client: TestClient):
    for path in ("/page/pictures/x", "/page/drawn/x.png", "/page/drawn/x/small.jpg"):
        assert client.get(path).status_code == 410


def test_the_sample_pictures_can_be_asked_about():
    from vipllava.serve.page.examples import sample_examples

    examples = sample_examples()
    assert len(examples) == 7
    for example in examples:
        turns = [Turn("user", example.question)]
        asked = mark_request(example.image, turns, parse_marks(list(example.marks)))
        assert "{" not in asked.request.turns[0].text
