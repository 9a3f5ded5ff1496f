"""A model of a folder, asked from Python: the engine's texts, whichever way they are asked for."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vipllava as vl
from tests.tiny_model import save_tiny_export
from vipllava.inference.engine import Engine
from vipllava.inference.marked import mark_request
from vipllava.inference.model import Model
from vipllava.inference.protocol import PromptTooLong
from vipllava.types import CheckpointError, ConfigError, Turn

PHOTO = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
RED = vl.Rectangle((3, 4, 20, 18), colour="red")
QUESTIONS = ["what is {0}?", "why?", "is {0} a cat, or is it rather not?"]


@pytest.fixture(scope="module")
def export(tiny_sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tiny_sources, tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def model(export: Path) -> Generator[Model]:
    with vl.load(export, device="cpu", chat_template="llava_v1") as opened:
        yield opened


@pytest.fixture(scope="module")
def texts(export: Path) -> list[str]:
    """What the engine under it answers, one question after the other."""
    engine = Engine.from_checkpoint(export, "cpu")
    asked = [
        mark_request(Image.fromarray(PHOTO), [Turn("user", text)], [RED], key=text).request
        for text in QUESTIONS
    ]
    return [engine.answer([each], max_new_tokens=12)[0] for each in asked]


def test_one_by_one_together_and_streamed_are_the_same_texts(model: Model, texts: list[str]):
    options: Any = {"regions": [RED], "max_new_tokens": 12}
    assert len(set(texts)) > 1
    one_by_one = [model.ask(PHOTO, question, **options) for question in QUESTIONS]
    assert [reply.text for reply in one_by_one] == texts
    assert [reply.text for reply in model.ask(PHOTO, QUESTIONS, **options)] == texts
    for question, text in zip(QUESTIONS, texts, strict=True):
        stream = model.ask(PHOTO, question, stream=True, **options)
        assert "".join(stream) == stream.reply.text == text
    usage = one_by_one[0].usage
    assert usage is not None
    assert usage.completion_tokens <= 12 < usage.prompt_tokens


def test_a_chat_is_the_conversation(model: Model, export: Path):
    chat = model.chat(PHOTO, RED)
    first = chat.ask("what is {0}?", max_new_tokens=4)
    second = chat.ask("sure?", max_new_tokens=12)
    turns = [Turn("user", "what is {0}?"), Turn("assistant", first.text), Turn("user", "sure?")]
    asked = mark_request(Image.fromarray(PHOTO), turns, [RED], key="chat").request
    engine = Engine.from_checkpoint(export, "cpu")
    assert second.text == engine.answer([asked], max_new_tokens=12)[0]


def test_draws_follow_their_seed(model: Model):
    options: Any = {"max_new_tokens": 12, "temperature": 1.5}
    drawn = [model.ask(PHOTO, "what?", seed=seed, **options).text for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_what_does_not_fit_is_said(model: Model, export: Path, tmp_path: Path):
    with pytest.raises(PromptTooLong, match="lower it, or shorten the conversation"):
        model.ask(PHOTO, "what?", max_new_tokens=100_000)
    with pytest.raises(ConfigError, match="device='abacus' is not a device"):
        vl.load(export, device="abacus")
    with pytest.raises(ConfigError, match=r"device_map='auto' .* leave one of them out"):
        vl.load(export, load_in="8bit", device_map="auto")
    with pytest.raises(CheckpointError, match="nowhere"):
        vl.load(tmp_path / "nowhere", device="cpu")
