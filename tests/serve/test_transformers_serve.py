"""`transformers serve` with an export and a picture whose marks are drawn: the engine's texts.

Another program reads the weights, makes the ids by the export's template and the pixels by its
image processor, and generates on its own. It answers one request at a time, refuses `regions`, and
takes neither `stream_options` nor log probabilities.
"""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.evaluation.conftest import export  # noqa: F401
from tests.toy_data import encode_picture
from vipllava.inference.engine import Engine
from vipllava.inference.marked import Asked, mark_request
from vipllava.types import Turn
from vipllava.visual_prompts.marks import MARKS

pytestmark = pytest.mark.slow

MAX_NEW_TOKENS = 12
_STARTS_S = 120.0


@pytest.fixture(scope="module")
def client(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:  # noqa: F811
    """A client of `transformers serve` on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    log = tmp_path_factory.mktemp("transformers_serve") / "log"
    options = ["--device", "cpu", "--dtype", "float32", "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [program, "serve", str(export), *options, "--host", "127.0.0.1"],
            stdout=file,
            stderr=file,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        address = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
            yield found
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(address, timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


def questions() -> list[Asked]:
    """One of each shape, on pictures of several forms; the last ones are further turns."""
    found: list[Asked] = []
    for number, kind in enumerate(MARKS.values()):
        stored = io.BytesIO(encode_picture(40 + 9 * number, 60 - 5 * number, seed=number))
        image = Image.open(stored).convert("RGB")
        turns = [Turn("user", "What is {0}?" + " Look at it." * (number % 3), has_image=True)]
        if number > 5:
            turns += [Turn("assistant", "A cup."), Turn("user", "Is it?")]
        found.append(mark_request(image, turns, [kind(box=(8, 6, 30, 20))], key=str(number)))
    return found


def messages(asked: Asked) -> list[Any]:
    said: list[Any] = []
    for turn in asked.request.turns:
        content: Any = turn.text
        if turn.has_image:
            picture = {"type": "image_url", "image_url": {"url": png_uri(asked.overlay)}}
            content = [picture, {"type": "text", "text": turn.text}]
        said.append({"role": turn.role, "content": content})
    return said


def png_uri(image: Image.Image | None) -> str:
    assert image is not None
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def test_greedy_texts_are_the_engines(client: openai.OpenAI, export: Path):  # noqa: F811
    asked = questions()
    engine = Engine.from_checkpoint(export, "cpu", "float32")
    expected = engine.answer([each.request for each in asked], max_new_tokens=MAX_NEW_TOKENS)
    assert len(set(expected)) > 5  # the model looks at its input

    def ask(each: Asked, stream: bool) -> str:
        reply: Any = client.chat.completions.create(
            model=str(export),
            messages=messages(each),
            max_tokens=MAX_NEW_TOKENS,
            temperature=0,
            stream=stream,
        )
        if not stream:
            return reply.choices[0].message.content.strip()
        pieces = [chunk.choices[0].delta.content or "" for chunk in reply]
        return "".join(pieces).strip()

    assert [ask(each, stream=False) for each in asked] == expected
    # Its streamer keeps back half a letter, which a random network may end with.
    streamed = [ask(each, stream=True).rstrip("\ufffd") for each in asked]
    assert streamed == [text.rstrip("\ufffd") for text in expected]


def test_regions_are_refused_by_it(client: openai.OpenAI, export: Path):  # noqa: F811
    """So marks have to be on the picture that it gets; ours refuses nothing of this."""
    said = messages(questions()[0])
    regions = [{"shape": "rectangle", "box": [1, 2, 9, 9]}]
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(
            model=str(export), messages=said, extra_body={"regions": regions}
        )
