"""Random requests, most of them wrong somewhere: no 500, no hang, no growth."""

from __future__ import annotations

import base64
import gc
import http.client
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine
from tests.toy_server import run_app, wait_for
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings
from vipllava.visual_prompts.marks import MARKS

# Pillow's, of a broken EXIF block; the command leaves them out.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
CHAT, PREVIEW = "/v1/chat/completions", "/v1/regions/preview"
CLIENTS = 8
ODD: list[Any] = [
    None, True, 0, -1, 1e308, -0.0, 2**63, 2**70, "", "\x00", "\ud800", "{0}", "{{0}}", "{99999}",
    "<image>", "</s>", "a" * 5000, "../../etc/passwd", [], {}, [[]], {"": None}, [None] * 200,
    float("nan"), float("inf"), "9" * 30, "\u202e", "https://127.0.0.1/x.png", "data:,",
]  # fmt: skip
NAMES = [
    "box", "polygon", "rle", "point", "stroke", "colour", "color", "width", "alpha", "seed", "zz",
    "image", "shape", "role", "content", "type", "text", "url", "stream", "n",
]  # fmt: skip


def image_bytes(rng: random.Random) -> bytes:
    least = rng.choice([1, 50, 50, 50])
    size = rng.randint(least, 90), rng.randint(least, 90)
    seed = np.random.default_rng(rng.randrange(2**32))
    mode = rng.choice(["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"])
    pixels = seed.integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    kind = {"CMYK": "JPEG", "I;16": "PNG"}.get(mode) or rng.choice(
        ["PNG", "PNG", "PNG", "WEBP", "GIF", "BMP"]
    )
    if mode in ("RGB", "L") and rng.random() < 0.3:
        kind = "JPEG"
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    data = bytearray(buffer.getvalue())
    for _ in range(rng.choice([0, 0, 0, 0, 0, 0, 1, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice([len(data)] * 15 + [rng.randint(0, len(data))])])


def region(rng: random.Random) -> Any:
    def number() -> float:
        return rng.choice([rng.randint(-20, 100), rng.uniform(-5, 95), 0, 99])

    def points(most: int) -> list[list[float]]:
        return [[number(), number()] for _ in range(rng.randint(1, most))]

    x, y = rng.randint(0, 45), rng.randint(0, 45)
    places: dict[str, Any] = {
        "box": [x, y, x + rng.randint(1, 40), y + rng.randint(1, 40)],
        "polygon": rng.choice([points(30), [points(9), points(9)]]),
        "rle": {"size": [rng.randint(1, 90), rng.randint(1, 90)],
                "counts": rng.choice([[rng.randint(0, 90) for _ in range(9)], "0:02o", "PPYo1"])},
        "point": [x, y],
        "stroke": points(30),
    }  # fmt: skip
    shape = rng.choice(list(MARKS))
    fitting = ["box", *MARKS[shape].places] if rng.random() < 0.9 else list(places)
    name = rng.choice(fitting)
    found = {"shape": shape, name: places[name]}
    if rng.random() < 0.5:
        found["colour"] = rng.choice(["red", "blue", "lime", [1, 2, 3], "pink"])
    if rng.random() < 0.3:
        found["width"] = rng.choice([1, 3, 50, 10_000, 2.5])
    return found


def request_of(rng: random.Random) -> tuple[str, Any]:
    kind = rng.choice(["png", "jpeg", "webp", "gif", "x"])
    url = f"data:image/{kind};base64,{base64.b64encode(image_bytes(rng)).decode()}"
    regions = [region(rng) for _ in range(rng.choice([0, 0, 0, 1, 1, 1, 1, 1, 2, 5, 101]))]
    if rng.random() < 0.3:
        return PREVIEW, {"image": url, "regions": regions, "format": rng.choice(["png", "json"])}
    text = rng.choice(["What?", "", "狗", "What?", "{0}", "{1} or {0}"])
    parts = [{"type": "text", "text": text},
             {"type": "image_url", "image_url": {"url": url}}]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": parts}]
    if rng.random() < 0.3:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "{0}"}]
    body: dict[str, Any] = {"model": "toy", "messages": messages, "regions": regions}
    options: dict[str, Any] = {
        "stream": True, "max_tokens": rng.randint(1, 9), "temperature": rng.random(),
        "overlay": True, "logprobs": True, "stop": ["a"], "seed": rng.randint(-9, 9), "top_k": 3,
    }  # fmt: skip
    for name in rng.sample(list(options), rng.randint(0, 4)):
        body[name] = options[name]
    return CHAT, body


def spoil(value: Any, rng: random.Random) -> Any:
    """Change one place of JSON values."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {other: each for other, each in value.items() if other != name}
        if change < 0.2:
            return value | {rng.choice(NAMES): rng.choice(ODD)}
        return value | {name: spoil(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value + [value[index]] * rng.randint(1, 50)
        return [spoil(each, rng) if n == index else each for n, each in enumerate(value)]
    return rng.choice(ODD)


def fuzzed(seed: int) -> tuple[str, bytes, dict[str, str]]:
    """Return a path, a body and headers."""
    rng = random.Random(seed)
    path, body = request_of(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        body = spoil(body, rng)
    data = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        spoiled = bytearray(data)
        for _ in range(rng.randint(1, 5)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        data = bytes(spoiled[: rng.choice([len(data), rng.randint(0, len(data))])])
    kinds = ["application/json"] * 40 + ["text/plain", "application/json; charset=utf-16", "x"]
    headers = {"Content-Type": rng.choice(kinds)}
    if rng.random() < 0.1:
        headers["X-Request-ID"] = rng.choice(["a b", "x" * 100, "fine", "%0d%0aSet-Cookie: a"])
    return path, data, headers


def ask_all(served: Served, seeds: range) -> Counter[int]:
    """Ask on a few connections at once and return how often each status came."""

    def ask(mine: range) -> Counter[int]:
        found: Counter[int] = Counter()
        connection = http.client.HTTPConnection("127.0.0.1", served.http.port, timeout=30)
        for seed in mine:
            path, data, headers = fuzzed(seed)
            connection.request("POST", path, data, headers)
            response = connection.getresponse()
            body = response.read()
            found[response.status] += 1
            assert response.status < 500, (seed, body[:500])
            if response.status >= 400:
                error = json.loads(body)["error"]
                assert set(error) == {"message", "type", "param", "code"}, seed
            elif response.getheader("content-type", "").startswith("text/event-stream"):
                assert body.endswith(b"data: [DONE]\n\n"), seed
                assert b'"error"' not in body, seed
        connection.close()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        parts = [seeds[start::CLIENTS] for start in range(CLIENTS)]
        total = sum(pool.map(ask, parts), Counter[int]())
    wait_for(lambda: served.serving.lifecycle.num_running == 0)
    assert served.serving.memory.free == served.serving.memory.size
    assert served.serving.models["toy"].admission.admitted == 0
    return total


@pytest.fixture
def toy() -> Iterator[Served]:
    engine = FakeEngine()
    app = build_app({"toy": engine}, ServerSettings(max_body_mb=2))
    with run_app(app) as server:
        yield Served(server, engine, app.state.serving)


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_three_hundred(toy: Served):
    found = ask_all(toy, range(300))
    assert found[200] > 30
    assert found[400] > 100
    assert set(found) <= {200, 400, 404, 413, 415}


@pytest.mark.slow
def test_ten_thousand(toy: Served):
    ask_all(toy, range(1_000))
    toy.engine.asked.clear()
    before = resident_mb()
    found = Counter[int]()
    for start in range(1_000, 10_000, 1_000):
        found += ask_all(toy, range(start, start + 1_000))
        toy.engine.asked.clear()
    assert found[200] > 1_000
    assert resident_mb() - before < 60
