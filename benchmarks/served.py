"""`vipllava serve` as a process, what it is asked, and a client that notes when texts arrive."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.evaluation import regions_data
from benchmarks.train_cases import ROOT, tiny_spec
from vipllava.types import Mention, Sample

CHAT: Final = "/v1/chat/completions"
CAPTION: Final = "Describe the picture in one sentence."
_MOST_IMAGES: Final = 800
_READY_S: Final = 120.0
_ENDS_S: Final = 30.0


def save_talkative(folder: Path) -> Path:
    """Write an export of the tiny model that never ends an answer, and return its folder.

    ``max_tokens`` alone says how long its answers are, so all ways of asking do the same work. Its
    projector is untrained; sizes are those of the quick start's model.
    """
    import torch

    from vipllava.checkpoints.export_meta import ExportMeta
    from vipllava.checkpoints.hf_format import save_export
    from vipllava.checkpoints.loading import build_model, load_tokenizer
    from vipllava.models.building import image_seq_length

    spec = replace(tiny_spec(), attn_implementation="sdpa")
    tokenizer = load_tokenizer(spec)
    model: Any = build_model(spec, tokenizer)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        # The same likelihood as another token's, which comes first.
        head[tokenizer.eos_token_id] = head[tokenizer.unk_token_id]
    meta = ExportMeta(
        stage="finetune",
        chat_template=spec.chat_template,
        image_aspect="pad",
        image_size=spec.image_size,
        image_seq_length=image_seq_length(spec),
        feature_layers=spec.feature_layers,
        vision_tower="tiny",
        language_model="tiny",
    )
    return save_export(model, tokenizer, folder, meta)


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        address: up to its port, without a path.
        pid: of its process.
    """

    address: str
    pid: int

    def get(self, path: str) -> str:
        """Return a page of it."""
        with _OPENER.open(self.address + path, timeout=10) as reply:
            return reply.read().decode()


_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def served(model: Path, *options: str) -> Iterator[Served]:
    """Run ``vipllava serve MODEL`` on a free port until the block ends.

    Raises:
        RuntimeError: it does not start; the message ends with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vipllava.cli", "serve", str(model)]
    command += ["--port", str(port), "--device", "cpu", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        found = Served(f"http://127.0.0.1:{port}", process.pid)
        try:
            _wait(found, process, log)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(found: Served, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            found.get("/ready")
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"vipllava serve is not ready: {said}") from None
            time.sleep(0.1)
        else:
            return


def questions(
    data_root: Path, number: int, *, max_tokens: int, caption: bool, first: int = 0
) -> list[Body]:
    """Return bodies of chat completions about the sample world's held-out images.

    Every one has another mark, so no two show the model the same pixels.

    Args:
        data_root: where the sample world is.
        number: of bodies.
        max_tokens: longest answer.
        caption: what the picture shows is asked, else what a record asks about its region.
        first: how many have been taken already.
    """
    samples = list(islice(regions_data(data_root).source(), _MOST_IMAGES))
    return [
        # Another opacity, and so another picture, each time that a sample comes round.
        _body(samples[n % len(samples)], 255 - n // len(samples), max_tokens, caption)
        for n in range(first, first + number)
    ]


Body = dict[str, Any]


def _body(sample: Sample, alpha: int, max_tokens: int, caption: bool) -> Body:
    assert sample.image is not None
    x1, y1, x2, y2 = sample.regions[0].bbox_xyxy
    parts = sample.turns[0].parts
    text = "".join(f"{{{each.region}}}" if isinstance(each, Mention) else each for each in parts)
    uri = f"data:image/jpeg;base64,{base64.b64encode(sample.image).decode()}"
    return {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": max_tokens,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": uri}},
                    {"type": "text", "text": CAPTION if caption else text},
                ],
            }
        ],
        "regions": [
            {"shape": "rectangle", "box": [x1, y1, x2, y2], "colour": "red", "alpha": alpha}
        ],
    }


@dataclass(frozen=True, slots=True)
class Heard:
    """What came back for one request.

    Attributes:
        status: of the response.
        text: of the answer, or the body of a refusal.
        finish_reason: None if the stream broke off.
        tokens: of the answer.
        first_s: until the first text, seconds.
        whole_s: until all was there.
    """

    status: int
    text: str
    finish_reason: str | None = None
    tokens: int = 0
    first_s: float = 0.0
    whole_s: float = 0.0


def to_stream(body: Mapping[str, Any]) -> bytes:
    """Return a body whose answer is streamed, its usage behind it."""
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()


async def hear(session: aiohttp.ClientSession, body: bytes) -> Heard:
    """Ask for a stream and read it to its end.

    Args:
        session: on the server's address.
        body: of the request, see :func:`to_stream`.
    """
    began = time.perf_counter()
    async with session.post(CHAT, data=body, headers=JSON) as reply:
        if reply.status != 200:
            return Heard(reply.status, await reply.text())
        pieces: list[str] = []
        first, finish, tokens, done = 0.0, None, 0, False
        async for event in events(reply):
            if event is None:
                done = True
                break
            if "error" in event:
                return Heard(reply.status, json.dumps(event["error"]))
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    pieces.append(piece)
                finish = choice["finish_reason"] or finish
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
        whole = time.perf_counter() - began
        # An answer without a letter has its first text when it ends.
        return Heard(
            reply.status, "".join(pieces), finish if done else None, tokens, first or whole, whole
        )


JSON: Final = {"Content-Type": "application/json"}


async def events(reply: aiohttp.ClientResponse) -> AsyncGenerator[Any]:
    """Yield what a stream says, and None for its ``[DONE]``."""
    async for line in reply.content:
        if line.startswith(b"data:"):
            said = line[5:].strip()
            yield None if said == b"[DONE]" else json.loads(said)


def open_session(address: str, timeout_s: float = 300.0) -> aiohttp.ClientSession:
    """Return a session that keeps its connections and waits for none."""
    return aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        read_bufsize=2**20,
    )


def name_of(server: Served) -> str:
    """Return the name of its first model."""
    names: Sequence[Any] = json.loads(server.get("/v1/models"))["data"]
    return names[0]["id"]
