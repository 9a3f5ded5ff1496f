"""SIGTERM to a process that serves: what runs is finished, what comes is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_engine import question
from tests.serve.test_clients import chat_bytes, connect, ends, read_until
from tests.toy_server import ToyServer, wait_for

ROOT = Path(__file__).resolve().parents[2]
ENDS_S = 30


@contextmanager
def process(grace_s: float) -> Iterator[tuple[subprocess.Popen[str], ToyServer]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.serve_job", str(grace_s)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with child, ExitStack() as stack:
        stack.callback(child.kill)
        assert child.stdout is not None
        nobody: Any = None
        server = ToyServer(int(child.stdout.readline()), nobody, nobody)
        wait_for(lambda: answers(server))
        yield child, server


def answers(server: ToyServer) -> bool:
    try:
        return server.get("/health").status == 200
    except OSError:
        return False


def test_what_runs_is_finished_and_what_comes_is_refused():
    with process(grace_s=20) as (child, server):
        stream = connect(server, chat_bytes("slow", stream=True))
        read_until(stream, b"The ")
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/ready").status == 503)
        assert server.get("/ready").json == {"status": "ending"}
        refused = server.chat(model="toy", messages=[question("?")])
        assert (refused.status, refused.error["code"]) == (503, "ending")
        assert refused.headers["retry-after"]
        assert server.get("/health").status == 200
        assert b"red." in (rest := ends(stream))
        assert b"data: [DONE]" in rest
        out, err = child.communicate(timeout=ENDS_S)
        assert (child.returncode, out) == (0, "closed True\n")
        assert "Traceback" not in err


@pytest.mark.parametrize("stream", [False, True])
def test_after_its_grace_what_runs_is_told(stream: bool):
    with process(grace_s=0.2) as (child, server):
        held = connect(server, chat_bytes("hold", stream=stream))
        if stream:
            read_until(held, b"The ")
        else:
            wait_for(lambda: b'running{model="toy"} 1.0' in server.get("/metrics").body)
        child.send_signal(signal.SIGTERM)
        told = ends(held)
        assert b'"code":"ending"' in told
        assert stream or told.startswith(b"HTTP/1.1 503 ")
        out, err = child.communicate(timeout=ENDS_S)
        assert (child.returncode, out) == (0, "closed True\n")
        assert "Traceback" not in err


def test_a_second_signal_ends_at_once():
    with process(grace_s=1000) as (child, server):
        held = connect(server, chat_bytes("hold", stream=True))
        read_until(held, b"The ")
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/ready").status == 503)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=ENDS_S)
        assert child.returncode == 128 + signal.SIGTERM
        assert err.endswith("ended at once by a second signal\n")
        held.close()
