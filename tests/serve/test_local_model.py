"""A model of this process behind the server: what it says, and what it cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_engine import data_uri, picture, question
from tests.serve.test_clients import chat_bytes, connect
from tests.tiny_model import save_tiny_export
from tests.toy_server import ToyServer, run_app, wait_for
from vipllava.inference.engine import Engine
from vipllava.inference.local_engine import LocalEngine
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings
from vipllava.types import Request, Turn

IMAGE = picture((50, 40))


@pytest.fixture(scope="module")
def folders(tiny_sources: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    return {
        "tiny": save_tiny_export(tiny_sources, root / "tiny"),
        "first": save_tiny_export(
            tiny_sources, root / "first", stage="pretrain", chat_template="plain"
        ),
    }


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[ToyServer]:
    engines = {
        name: LocalEngine(Engine.from_checkpoint(folder, "cpu")) for name, folder in folders.items()
    }
    with run_app(build_app(engines, ServerSettings())) as found:
        yield found


def test_greedy_texts_are_the_engines(server: ToyServer, folders: dict[str, Path]):
    turns = [Turn("user", "What is it?", has_image=True)]
    engine = Engine.from_checkpoint(folders["tiny"], "cpu")
    (wanted,) = engine.answer([Request(IMAGE, turns)], max_new_tokens=12)
    body = {"model": "tiny", "messages": [question("What is it?", data_uri(IMAGE))]}
    whole = server.chat(**body, max_tokens=12)
    assert whole.status == 200, whole.body
    assert whole.json["choices"][0]["message"]["content"] == wanted
    events = server.chat(**body, max_tokens=12, stream=True).events
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(texts) == wanted
    usage = whole.json["usage"]
    assert usage["prompt_tokens"] == len(engine.encoder.encode_generation_prompt(turns))


def test_log_probabilities_add_up_to_the_text(server: ToyServer):
    body = {"model": "tiny", "messages": [question("What is it?", data_uri(IMAGE))]}
    found = server.chat(**body, max_tokens=5, logprobs=True, top_logprobs=2).json["choices"][0]
    tokens = found["logprobs"]["content"]
    assert all(each["logprob"] <= 0 for each in tokens)
    assert all(each["top_logprobs"][0]["token"] == each["token"] for each in tokens)  # greedy


def test_a_prompt_that_is_too_long(server: ToyServer):
    for body in (
        {"messages": [question("a" * 600)]},
        {"messages": [question("a" * 100, data_uri(IMAGE))], "max_tokens": 500},
    ):
        for stream in (False, True):
            refused = server.chat(model="tiny", **body, stream=stream)
            assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
            assert "512" in refused.error["message"]


def test_a_stage_1_model_needs_an_image(server: ToyServer):
    refused = server.chat(model="first", messages=[question("What is it?")])
    assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")
    assert "stage-1" in refused.error["message"]
    said = [question("", data_uri(IMAGE))]
    assert server.chat(model="first", messages=said, max_tokens=3).status == 200


def test_all_are_ready_and_a_client_that_leaves_is_forgotten(server: ToyServer):
    assert server.get("/ready").json["models"] == {"tiny": "ready", "first": "ready"}
    left = connect(server, chat_bytes("?", model="tiny", max_tokens=200, stream=True))
    left.recv(10)
    left.close()
    wait_for(lambda: b'vipllava_running{model="tiny"} 0.0' in server.get("/metrics").body)
    assert server.chat(model="tiny", messages=[question("?")], max_tokens=2).status == 200
