"""`vipllava demo`: what it opens, and what it says when it cannot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page.fake_engine import FakeEngine
from tests.tiny_model import save_tiny_export
from tests.toy_server import wait_for
from vipllava.cli import main
from vipllava.commands import demo as demo_module


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_model_it_names_the_quick_start(capsys: pytest.CaptureFixture[str]):
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "runs/quickstart/*/export has none" in said
    assert "make quickstart" in said


def test_what_cannot_be_opened_is_said(capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "nowhere", "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["demo", "x", "--key-env", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY" in capsys.readouterr().err
    assert main(["demo", "x", "--max-mb", "nan"]) == 2
    assert "--max-mb" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "x", "--port", str(port)]) == 2
    assert f"port={port}" in capsys.readouterr().err.replace("--port ", "port=")


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = demo_module.find_spec
    monkeypatch.setattr(demo_module, "find_spec", lambda n: None if n == "gradio" else found(n))
    assert main(["demo", "x"]) == 2
    said = capsys.readouterr().err
    assert "the page needs gradio, which is not installed" in said
    assert "vipllava-lightning[demo]" in said


def test_share_is_off_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from gradio import networking

    def no_tunnel(*given: Any) -> str:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr(networking, "setup_tunnel", no_tunnel)
    assert main(["demo", "--base-url", "http://127.0.0.1:9/v1", "--share", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "no public link could be made (Could not get share link" in said


def test_page_and_api_are_one_app(tmp_path: Path):
    from fastapi.testclient import TestClient

    app = demo_module.build_demo({"toy": FakeEngine()}, (), feedback=tmp_path / "votes.jsonl")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        page = client.get("/").text
        assert "ViP-LLaVA" in page
        assert "startPage" in page
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["toy"]
        refused = client.post("/page/pictures", content=b"x", headers={"content-type": "image/png"})
        assert refused.status_code == 422
        said = "the picture: 1 bytes starting with b'x' are no image; expected JPEG, PNG"
        assert refused.json()["error"]["message"] == f"{said}, WEBP, GIF, BMP"
        assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_a_server_that_does_not_answer_is_said_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from fastapi.testclient import TestClient

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    app = demo_module.build_demo({}, [address], feedback=tmp_path / "votes.jsonl")
    with TestClient(app, base_url="http://127.0.0.1"):
        wait_for(lambda: "does not answer" in caplog.text)
    (said,) = (line for line in caplog.messages if "does not answer" in line)
    assert said.startswith(f"{address} does not answer: does not list its models: ")
    assert said.endswith("(mostly /v1), and that it needs no key: none is sent")


@pytest.mark.slow
def test_the_quick_starts_model_is_served_until_a_signal(tiny_sources: Any, tmp_path: Path):
    save_tiny_export(tiny_sources, tmp_path / "runs/quickstart/tiny-gpt4v/export")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "vipllava.cli", "demo", "--port", str(port)]
    env = os.environ | {"PYTHONPATH": str(root), "no_proxy": "127.0.0.1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("the page does not come")
        assert b"ViP-LLaVA" in page
        assert b"tiny-gpt4v" in page
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as reply:
            assert b"tiny-gpt4v" in reply.read()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"the page is at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said
