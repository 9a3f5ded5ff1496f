"""Processes and other servers behind one server: who is asked, and what a client hears of it."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.fake_engine import open_fake
from tests.toy_server import ToyServer, run_app
from vipllava.inference.endpoint_client import EndpointSettings
from vipllava.inference.openai_engine import OpenAIEngine
from vipllava.inference.worker_pool import WorkerPool
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings
from vipllava.visual_prompts.mark_fields import parse_marks
from vipllava.visual_prompts.marks import plan_marks
from vipllava.visual_prompts.render import render_plan


@pytest.fixture(scope="module")
def workers() -> Iterator[ToyServer]:
    """Two processes behind one server."""
    app = build_app({"toy": WorkerPool(open_fake, ["left", "right"])}, ServerSettings())
    with run_app(app) as server:
        assert server.get("/ready").json["models"] == {"toy": "no worker is ready (not started)"}
        say(server, "toy", "hi")  # `vipllava serve` starts them before it listens
        assert server.get("/ready").status == 200
        yield server


@pytest.fixture(scope="module")
def front(workers: ToyServer) -> Iterator[ToyServer]:
    """Another server in front of that one, as in front of vLLM."""
    behind = EndpointSettings(f"{workers.url}/v1", "toy", max_retries=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        with run_app(build_app({"front": OpenAIEngine(behind)}, ServerSettings())) as server:
            yield server


def say(server: ToyServer, model: str, text: Any, **more: Any) -> Any:
    return server.chat(model=model, messages=[{"role": "user", "content": text}], **more)


def text_of(reply: Any) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"]


def test_both_processes_answer(workers: ToyServer):
    replies: list[str] = []
    threads = [
        threading.Thread(target=lambda: replies.append(text_of(say(workers, "toy", "hi"))))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 20
    assert set(Counter(replies)) <= {"left: hi", "right: hi"}
    listed = workers.get("/v1/models").json["data"]
    assert [each["max_model_len"] for each in listed] == [77]


@pytest.mark.parametrize("stream", [False, True])
def test_a_process_that_dies_is_a_503_to_be_asked_again(workers: ToyServer, stream: bool):
    reply = say(workers, "toy", "die", stream=stream)
    assert reply.status == 503
    assert "Retry-After".lower() in reply.headers
    assert "ask again" in reply.error["message"]
    for _ in range(4):
        assert text_of(say(workers, "toy", "hi")).endswith(": hi")


def test_regions_are_drawn_in_front_and_pixels_arrive(front: ToyServer):
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    png = io.BytesIO()
    image.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "image"},
    ]
    region = {"shape": "ellipse", "box": [5, 5, 30, 30], "colour": "blue"}
    said = text_of(say(front, "front", content, regions=[region]))
    drawn = render_plan(image, plan_marks(parse_marks([region]), image.size))
    assert said.partition(": ")[2] == hashlib.sha256(drawn.tobytes()).hexdigest()
    assert drawn.tobytes() != image.tobytes()


def test_what_goes_wrong_behind_is_said_in_front(front: ToyServer):
    refused = say(front, "front", "refuse")
    assert refused.status == 400
    assert "top_p=7: expected a share" in refused.error["message"]
    # Two deaths: it was asked a second time.
    assert say(front, "front", "die").status == 503
    events = say(front, "front", "hi", stream=True).events
    texts = [each["choices"][0]["delta"].get("content") or "" for each in events if each["choices"]]
    assert "".join(texts) in ("left: hi", "right: hi")
