"""The same marks are the same pixels by every door, and the same as training's renderer draws.

Python, terminal, server, its preview, and what the page shows; for every shape at every place that
it may have, on a picture that its file stores turned on its side.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

import vipllava as vl
from tests.serve.everywhere import (
    SIZE,
    every_mark,
    options_of_marks,
    picture,
    read_png,
    read_uri,
)
from tests.tiny_model import save_tiny_export
from tests.toy_server import ToyServer, run_app
from vipllava.cli import main
from vipllava.inference.engine import Engine
from vipllava.inference.local_engine import LocalEngine
from vipllava.records.image_decode import decode_image
from vipllava.serve.app import build_app
from vipllava.serve.page.pictures import PictureStore
from vipllava.serve.page.routes import build_routes
from vipllava.serve.settings import ServerSettings
from vipllava.visual_prompts.mark_fields import mark_to_fields
from vipllava.visual_prompts.marks import MARKS, Mark, plan_marks
from vipllava.visual_prompts.render import render_plan

FILE = picture()
MARKS_OF_EACH = every_mark()
# Which colour the first one gets is known when the second one is.
LATER_COLOUR: list[Mark] = [
    vl.Rectangle((10, 10, 40, 40)),
    vl.Rectangle((30, 30, 60, 60), colour="red"),
]
# One alone, and all on one picture, where each hides some of others.
CASES = [*([mark] for mark in MARKS_OF_EACH), LATER_COLOUR, MARKS_OF_EACH]
NAMES = [*(f"{mark.shape}-{n}" for n, mark in enumerate(MARKS_OF_EACH)), "later colour", "all"]


def drawn(marks: list[Mark]) -> Image.Image:
    """What training's renderer draws on the picture as training decodes it."""
    image = decode_image(FILE, "picture")
    assert image.size == SIZE
    return render_plan(image, plan_marks(marks, image.size))


def assert_same(found: Image.Image | None, marks: list[Mark]) -> None:
    expected = drawn(marks)
    assert found is not None
    assert (found.mode, found.size) == (expected.mode, expected.size)
    assert found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def export(tiny_sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tiny_sources, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(export: Path) -> Iterator[vl.Model]:
    with vl.load(export, device="cpu", dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[ToyServer]:
    engine = LocalEngine(Engine.from_checkpoint(export, "cpu", "float32"))
    with run_app(build_app({"tiny": engine}, ServerSettings())) as server:
        yield server


@pytest.fixture(scope="module")
def page() -> Iterator[ToyServer]:
    """What is behind the page, without its controls."""
    app = FastAPI()
    app.include_router(build_routes(PictureStore(), []))
    with run_app(app) as server:
        yield server


def test_every_shape_is_there_and_seen():
    assert {mark.shape for mark in MARKS_OF_EACH} == set(MARKS)
    plain = decode_image(FILE, "picture").tobytes()
    pictures = {drawn([mark]).tobytes() for mark in MARKS_OF_EACH}
    assert plain not in pictures
    assert len(pictures) == len(MARKS_OF_EACH)  # no two look the same


@pytest.mark.parametrize("marks", CASES, ids=NAMES)
def test_in_python(model: vl.Model, marks: list[Mark]):
    reply = model.ask(FILE, "What?", regions=marks, max_new_tokens=1)
    assert_same(reply.overlay, marks)
    assert_same(model.chat(FILE, regions=marks).overlay, marks)


@pytest.mark.parametrize("marks", CASES, ids=NAMES)
def test_by_a_server(server: ToyServer, marks: list[Mark]):
    uri = f"data:image/jpeg;base64,{base64.b64encode(FILE).decode()}"
    image = {"type": "image_url", "image_url": {"url": uri}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    regions = [mark_to_fields(mark) for mark in marks]
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "regions": regions}
    whole = server.chat(messages=messages, overlay=True, **body)
    assert whole.status == 200, whole.body
    assert_same(read_uri(whole.json["choices"][0]["message"]["vipllava"]["overlay"]), marks)

    events = server.chat(messages=messages, overlay=True, stream=True, **body).events
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    (said,) = [delta["vipllava"] for delta in deltas if "vipllava" in delta]
    assert_same(read_uri(said["overlay"]), marks)

    preview = server.post("/v1/regions/preview", {"image": uri, "regions": regions})
    assert preview.status == 200, preview.body
    found = preview.json["overlay"] if preview.body.startswith(b"{") else None
    assert_same(read_uri(found) if found else read_png(preview.body), marks)


@pytest.mark.parametrize("marks", CASES, ids=NAMES)
def test_on_the_page(page: ToyServer, marks: list[Mark]):
    opened = page.ask("POST", "/page/pictures", FILE, {"Content-Type": "image/jpeg"}).json
    assert (opened["width"], opened["height"]) == SIZE
    fields = [mark_to_fields(mark) for mark in marks]
    planned = page.post("/page/plan", {"picture": opened["picture"], "marks": fields}).json
    found = page.get(f"/page/drawn/{planned['drawn']}.png")
    assert found.headers["content-type"] == "image/png"
    assert_same(read_png(found.body), marks)


@pytest.mark.parametrize("marks", CASES[-2:], ids=NAMES[-2:])
def test_in_a_terminal(
    export: Path, marks: list[Mark], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Several on one picture: each call loads the model."""
    path = tmp_path / "picture.jpg"
    path.write_bytes(FILE)
    options = options_of_marks(marks, tmp_path)
    command = ["chat", str(export), str(path), *options, "--device", "cpu", "--dtype", "float32"]
    command += ["--question", "What?", "--max-new-tokens", "1", "--json"]
    saved = tmp_path / "saved.json"
    assert main([*command, "--save", str(saved)]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert_same(read_png(Path(json.loads(line)["overlay"]).read_bytes()), marks)
    assert_same(read_png((tmp_path / "saved-overlay.png").read_bytes()), marks)
