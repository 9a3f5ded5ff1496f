"""A conversation whose model is scripted and whose terminal is a text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.terminal.scripted import ScriptedEngine
from vipllava.inference.model import Model
from vipllava.inference.protocol import Sampling
from vipllava.serve.terminal.opening import open_picture
from vipllava.serve.terminal.output import Output
from vipllava.serve.terminal.talk import Talk


@dataclass
class Chatting:
    """A conversation, its engine, and what was written."""

    talk: Talk
    engine: ScriptedEngine
    written: io.StringIO

    @property
    def shown(self) -> list[str]:
        """The lines written since the last look, without blanks at their ends."""
        lines = [line.rstrip() for line in self.written.getvalue().splitlines()]
        self.written.seek(0)
        self.written.truncate()
        return lines


@pytest.fixture
def picture_path(tmp_path: Path) -> Path:
    path = tmp_path / "a kitchen.png"
    Image.new("RGB", (400, 300), (90, 90, 90)).save(path)
    return path


@pytest.fixture
def start(picture_path: Path) -> Iterator[Any]:
    """Begin a conversation about the picture, or about none."""
    opened: list[Model] = []

    def begin(picture: bool = True, **engine: Any) -> Chatting:
        scripted, written = ScriptedEngine(**engine), io.StringIO()

        model = Model(scripted)
        opened.append(model)
        chat = model.chat(picture_path if picture else None)
        out = Output(written, written, "none", {})
        return Chatting(
            Talk(chat, out, Sampling(), partial(open_picture, allow_urls=False)), scripted, written
        )

    yield begin
    for model in opened:
        model.close()


Start = Callable[..., Chatting]
