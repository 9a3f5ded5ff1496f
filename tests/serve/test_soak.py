"""The soak of docs/serving.md: two minutes of a real server; that it sees faults, in a second."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks import serve, soak
from benchmarks.served import Served, save_talkative, served
from benchmarks.soak import Found
from vipllava.sample_world.build import ensure_sample_world

_KNOWN = {"model", "temperature", "max_tokens", "messages", "regions", "stream", "stream_options"}


@dataclass
class Toy:
    """A server that does as it should, up to what is set.

    Attributes:
        text: of an answer, by the text that it would have and its number.
        num_left_open: requests that it says to have.
        refuses: the status of nonsense.
        breaks: whether a streamed answer lacks its end now and then.
        count: answers so far.
        seen: pictures with their marks.
    """

    text: Callable[[str, int], str] = lambda text, number: text
    num_left_open: int = 0
    refuses: int = 400
    breaks: bool = False
    count: int = 0
    seen: set[str] = field(default_factory=set)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "toy"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        lines = 'vipllava_running{model="toy"} 0.0\nvipllava_waiting{model="toy"} '
        return web.Response(text=f"{lines}{self.num_left_open}.0\n")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read(), parse_constant=lambda name: 1 / 0)
            (image, text) = body["messages"][0]["content"]
            (region,) = body["regions"]
            fine = image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
            fine = fine and body["model"] == "toy" and body["temperature"] == 0
            fine = fine and max(region["box"]) < 1000 and region["colour"] == "red"
            fine = (
                fine and set(region) == {"shape", "box", "colour", "alpha"} and set(body) <= _KNOWN
            )
        except (ValueError, LookupError, TypeError, ArithmeticError):
            fine = False
        if not fine:
            return web.json_response({"error": {"message": "no"}}, status=self.refuses)
        self.count += 1
        self.seen.add(f"{image['image_url']['url']} {region}")
        said = self.text(f"{text['text']} {len(image['image_url']['url'])}", self.count)
        choice = {"index": 0, "finish_reason": "stop"}
        if not body.get("stream"):
            message = {"role": "assistant", "content": said}
            return web.json_response({"choices": [choice | {"message": message}]})
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for letter in said:
            await self.send(reply, {"delta": {"content": letter}, "finish_reason": None})
        if not (self.breaks and self.count > soak.NUM_QUESTIONS and self.count % 3 == 0):
            await self.send(reply, choice | {"delta": {}})
            await reply.write(b"data: [DONE]\n\n")
        return reply

    async def send(self, reply: web.StreamResponse, choice: dict[str, Any]) -> None:
        await reply.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


@contextmanager
def run_toy(toy: Toy) -> Iterator[Served]:
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", toy.models)
        app.router.add_get("/metrics", toy.metrics)
        app.router.add_post("/v1/chat/completions", toy.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{runner.addresses[0][1]}", os.getpid())
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    ensure_sample_world(root, scale=0.01)
    return root


def soaked(toy: Toy, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    monkeypatch.setattr(soak, "_SETTLES_S", 0.0)
    monkeypatch.setattr(soak, "FLAT", 10.0)  # this process is a test's, too
    with run_toy(toy) as server:
        return asyncio.run(soak.soak(server, data_root, 1.0, clients=8))


def test_a_server_that_does_as_it_should(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    found = soaked(Toy(), data_root, monkeypatch)
    assert found.faults == []
    assert all(found.done[kind] for kind in ("stream", "ask", "nonsense"))
    assert found.row()["wrong"] == 0


@pytest.mark.parametrize(
    ("toy", "fault"),
    [
        (
            Toy(text=lambda text, number: text[number > soak.NUM_QUESTIONS and number % 3 == 0 :]),
            "instead of",
        ),
        (Toy(breaks=True), "finish_reason=None"),
        (Toy(refuses=500), r"nonsense \(.*\): 500"),
        (Toy(num_left_open=2), "2 requests are still open"),
    ],
    ids=["another's answer", "no end", "nonsense fails", "left open"],
)
def test_faults_are_seen(toy: Toy, fault: str, data_root: Path, monkeypatch: pytest.MonkeyPatch):
    found = soaked(toy, data_root, monkeypatch)
    assert any(re.search(fault, each) for each in found.faults), found.faults


def test_growth_is_seen():
    found = Found(memory_mib=[(second, 100.0 + second) for second in range(121)])
    assert found.thirds == (144.5, 205.5)  # of seconds 30 to 120: 30 to 59, 91 to 120
    assert found.faults == ["memory grew from 144 to 206 MiB"]
    flat = Found(memory_mib=[(second, 100.0 + second % 3) for second in range(121)])
    assert flat.faults == []
    short = Found(memory_mib=[(second, max(100.0, 90.0 + 2 * second)) for second in range(11)])
    assert short.thirds == (101.0, 109.0)


def test_speed_is_measured(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "_REQUESTS", {1: 2, 8: 8, 32: 8})
    toy = Toy()
    with run_toy(toy) as server:
        rows = asyncio.run(serve.measure(server, data_root, rounds=2))
    assert [(row["answers"], row["clients"]) for row in rows] == [
        (workload, clients) for workload in ("short", "long", "mix") for clients in (1, 8, 32)
    ]
    assert toy.count == 3 * 3 * (2 + 8 + 8)
    assert len(toy.seen) == toy.count  # no picture twice
    for alone, *more in (rows[:3], rows[3:6], rows[6:]):
        assert alone["ratio"] == 1
        assert all(row["ratio"] > 0 for row in more)
    assert all(row["first_p50_ms"] <= row["whole_p50_ms"] <= row["whole_p95_ms"] for row in rows)


def test_a_broken_answer_is_no_figure(data_root: Path):
    toy = Toy(breaks=True)
    with (
        run_toy(toy) as server,
        pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no whole answer")),
    ):
        asyncio.run(serve.measure(server, data_root, rounds=1))


@pytest.mark.slow
def test_two_minutes(tmp_path: Path, data_root: Path):
    with served(save_talkative(tmp_path / "tiny")) as server:
        found = asyncio.run(soak.soak(server, data_root, 120.0))
    assert found.faults == []
    assert found.done["stream"] > 100
