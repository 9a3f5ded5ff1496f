"""`vipllava serve` as a process: what it says, whom it asks, how it ends; and its mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_engine import FakeEngine, data_uri, picture, question
from tests.toy_server import ToyServer, run_app
from vipllava import cli
from vipllava.serve.app import build_app
from vipllava.serve.engines import EngineOptions, open_engines
from vipllava.serve.server import bind
from vipllava.serve.settings import ServerSettings
from vipllava.types import ConfigError, VipLlavaError

ROOT = Path(__file__).resolve().parents[2]
ENDS_S = 60


@contextmanager
def serving(
    *words: str, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], ToyServer, str]]:
    """Run the command on a free port until the block ends; yields what it says first, too."""
    child = subprocess.Popen(
        [sys.executable, "-m", "vipllava.cli", "serve", "--port", "0", *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with child, ExitStack() as stack:
        stack.callback(child.kill)
        assert child.stderr is not None
        said = ""
        while not (found := re.search(r"serving .* at http://\S+:(\d+)/v1", said)):
            line = child.stderr.readline()
            assert line, said
            said += line
        nobody: Any = None
        server = ToyServer(int(found[1]), nobody, nobody)
        assert server.get("/ready").status == 200  # it has said that it serves
        yield child, server, said


def test_an_engine_behind_an_address():
    engine = FakeEngine(pieces=lambda asked: ["up", "stream"])
    with run_app(build_app({"fake": engine}, ServerSettings(api_key="up-key"))) as upstream:
        with serving(
            "--engine", f"{upstream.url}/v1", "--engine-key-env", "UP_KEY",
            "--api-key-env", "MY_KEY", MY_KEY="my-key", UP_KEY="up-key",
        ) as (child, server, said):  # fmt: skip
            server.headers["Authorization"] = "Bearer my-key"
            assert "serving fake at" in said
            (model,) = server.get("/v1/models").json["data"]
            assert (model["id"], model["max_model_len"]) == ("fake", 512)
            mark = {"shape": "point", "point": [5, 5], "colour": "lime"}
            body = {"model": "fake", "regions": [mark]}
            body["messages"] = [question("What is {0}?", data_uri(picture()))]
            whole = server.chat(**body).json["choices"][0]["message"]
            assert whole["content"] == "upstream"
            assert whole["vipllava"]["words"] == ["at the lime point"]
            events = server.chat(**body, stream=True).events
            assert [e["choices"][0]["delta"].get("content") for e in events] == [
                "", "up", "stream", None,
            ]  # fmt: skip
            asked = engine.asked[-1].request
            assert asked.turns[-1].text == "What is at the lime point?"
            assert asked.image is not None
            assert asked.image.getpixel((5, 5)) != (10, 120, 200)
            child.send_signal(signal.SIGTERM)
            out, err = child.communicate(timeout=ENDS_S)
        assert child.returncode == 0, err
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["status"] for line in lines if line["path"].endswith("completions")] == [
            200
        ] * 2
        assert "key" not in out
        assert "Traceback" not in err


def test_an_engine_that_is_not_there_any_more():
    with run_app(build_app({"fake": FakeEngine()}, ServerSettings())) as upstream:
        engines = open_engines([], [f"{upstream.url}/v1#fake"], ["mine"], EngineOptions())
    with run_app(build_app(engines, ServerSettings())) as server:
        found = server.chat(model="mine", messages=[question("?")])
        assert (found.status, found.error["code"]) == (502, "engine_unavailable")
        assert str(upstream.port) not in found.error["message"]
        ready = server.get("/ready")
        assert ready.status == 503
        assert set(ready.json["models"]) == {"mine"}


def test_which_of_an_endpoints_models():
    app = build_app({"one": FakeEngine(), "two": FakeEngine()}, ServerSettings())
    with run_app(app) as upstream:
        url = f"{upstream.url}/v1"
        with pytest.raises(ConfigError, match=rf"serves one, two: say which, --engine {url}#NAME"):
            open_engines([], [url], [], EngineOptions())
        found = open_engines([], [f"{url}#two", f"{url}#one"], ["first"], EngineOptions())
        assert list(found) == ["first", "one"]
        with pytest.raises(ConfigError, match="two models are called 'two'"):
            open_engines([], [f"{url}#two"] * 2, [], EngineOptions())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to serve: name a model's folder, or an endpoint by --engine URL"),
        (["a", "--name", "b", "--name", "c"], "2 names for 1 models: give --name at most once"),
        (["a", "--api-key-env", "NOT_SET"], "--api-key-env NOT_SET: this environment variable"),
        (["a", "--deadline-s", "0"], "--deadline-s 0.0: expected a finite number above 0"),
        (["a", "--cors", "example.org"], "--cors example.org: expected e.g. https://example.org"),
        (["--engine", "example.org"], "expected e.g. http://localhost:8000/v1"),
        (["a", "--host", "203.0.113.1"], "--host 203.0.113.1 --port 8000 cannot be served"),
        (["a/b", "c/b", "--name", "c/b"], "two models are called 'c/b'"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.delenv("NOT_SET", raising=False)
    assert cli.main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "a", "--port", str(port)]) == 2
    assert f"--port {port} cannot be served: " in capsys.readouterr().err


def test_a_port_is_taken_before_anything_is_loaded():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port={port} cannot be served: .*another --port"):
            bind("127.0.0.1", port)


def test_what_is_opened_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"), pytest.raises(VipLlavaError):
        open_engines(["no/such"], (), (), EngineOptions())
    assert caplog.messages[0] == "opening no/such ..."


def test_models_are_called_by_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path in ("runs/tiny-gpt4v/export", "my_model"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.setattr("vipllava.serve.engines._open_model", lambda source, how: FakeEngine())
    sources = [str(tmp_path / "runs/tiny-gpt4v/export"), str(tmp_path / "my_model"), "llava-hf/vip"]
    assert list(open_engines(sources, (), (), EngineOptions())) == [
        "tiny-gpt4v", "my_model", "llava-hf/vip"
    ]  # fmt: skip
    assert list(open_engines(sources[:2], (), ["first"], EngineOptions())) == ["first", "my_model"]
