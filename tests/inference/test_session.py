"""A conversation: turns, marks that come and go, another image, and its file."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inference.scripted_engine import ScriptedEngine
from vipllava.inference.marked import mark_request
from vipllava.inference.model import Model
from vipllava.inference.session import Chat
from vipllava.types import RecordError, Turn, VipLlavaError
from vipllava.visual_prompts.mark_fields import parse_marks
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.marks import Arrow, Rectangle

PHOTO = np.full((80, 100, 3), 90, np.uint8)
BOX = (10, 20, 60, 70)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def model(engine: ScriptedEngine) -> Generator[Model]:
    with Model(engine) as opened:
        yield opened


@pytest.fixture
def chat(model: Model) -> Chat:
    return model.chat(PHOTO, [Rectangle(BOX)])


def test_turns_follow_each_other_and_the_image_is_in_the_first(chat: Chat, engine: ScriptedEngine):
    reply = chat.ask("What is {0}?", max_new_tokens=9)
    assert reply.text == "You asked: What is within the red rectangle? "
    assert chat.reply is reply
    chat.ask("Why {{0}}?")
    turns = (
        Turn("user", "What is within the red rectangle?", has_image=True),
        Turn("assistant", "You asked: What is within the red rectangle? "),
        Turn("user", "Why {0}?"),
    )
    assert engine.asked[1].request.turns == turns
    assert engine.asked[0].sampling.max_new_tokens == 9
    assert [turn.text for turn in chat.turns] == [
        *(turn.text for turn in turns),
        "You asked: Why {0}? ",
    ]
    assert len({each.request.key for each in engine.asked}) == 2


def test_a_mark_that_comes_later_is_in_the_one_image(chat: Chat, engine: ScriptedEngine):
    chat.ask("What is {0}?")
    assert chat.add(Arrow((5, 5, 30, 30))) == "pointed to by the red arrow"
    assert chat.add(Rectangle((5, 5, 30, 30))) == "within the lime rectangle"
    chat.ask("And {2}?")
    first, second = (each.request for each in engine.asked)
    assert first.image is not None
    assert second.image is not None
    assert first.image.tobytes() != second.image.tobytes()
    marks = [Rectangle(BOX), Arrow((5, 5, 30, 30)), Rectangle((5, 5, 30, 30))]
    expected = mark_request(Image.fromarray(PHOTO), [Turn("user", "x")], marks)
    assert expected.overlay is not None
    assert second.image.tobytes() == expected.overlay.tobytes()
    assert second.turns[0].has_image
    assert second.turns[-1] == Turn("user", "And within the lime rectangle?")


def test_marks_keep_their_colours(chat: Chat):
    chat.add(Rectangle(BOX))
    chat.add(Rectangle(BOX, colour="blue"))
    chat.undo()
    chat.add(Rectangle(BOX))
    assert chat.words == tuple(f"within the {name} rectangle" for name in ("red", "lime", "blue"))
    assert [mark.colour for mark in chat.marks] == ["red", "lime", "blue"]
    chat.clear()
    assert (chat.marks, chat.words) == ((), ())
    with pytest.raises(VipLlavaError, match="there is no mark to take back"):
        chat.undo()


def test_the_first_marks_have_the_colours_that_they_have_in_a_question(model: Model):
    marks = [Rectangle(BOX), Rectangle(BOX, colour="red"), Arrow(BOX)]
    words = ("within the lime rectangle", "within the red rectangle", "pointed to by the red arrow")
    assert model.chat(PHOTO, marks).words == model.ask(PHOTO, "a", marks).words == words
    with pytest.raises(MarkError, match=r"regions\[1\]\.box is \(300"):
        model.chat(PHOTO, [Rectangle(BOX), Rectangle((300, 0, 400, 9))])


def test_what_was_said_stays_when_its_mark_goes(chat: Chat, engine: ScriptedEngine):
    chat.ask("What is {0}?")
    chat.undo()
    chat.ask("And now?")
    assert engine.asked[1].request.turns[0].text == "What is within the red rectangle?"
    assert chat.overlay is not None
    assert np.array_equal(np.asarray(chat.overlay), PHOTO)


def test_what_cannot_be_marked_changes_nothing(chat: Chat, model: Model):
    before = (chat.marks, chat.overlay)
    with pytest.raises(MarkError, match=r"regions\[1\]\.box is \(300"):
        chat.add(Rectangle((300, 0, 400, 9)))
    with pytest.raises(RecordError, match=r"mentions \{1\}"):
        chat.ask("What is {1}?")
    with pytest.raises(RecordError, match="no image"):
        chat.show(b"x")
    assert (chat.marks, chat.overlay) == before
    with pytest.raises(VipLlavaError, match="there is no image to mark: show one first"):
        model.chat().add(Rectangle(BOX))


def test_another_image_begins_anew_and_a_reset_keeps_it(chat: Chat, engine: ScriptedEngine):
    chat.ask("What is {0}?")
    chat.reset()
    assert (chat.turns, chat.reply, len(chat.marks)) == ((), None, 1)
    chat.ask("What is {0}?")
    chat.image = np.zeros((30, 40), np.uint8)
    assert (chat.turns, chat.marks, chat.reply) == ((), (), None)
    assert chat.image is not None
    assert chat.image.size == (40, 30)
    with pytest.raises(RecordError, match=r"mentions \{0\}, and nothing is marked"):
        chat.ask("Hello {0}")
    chat.show(None)
    chat.ask("Hello {0}")
    assert engine.asked[-1].request.image is None
    assert engine.asked[-1].request.turns == (Turn("user", "Hello {0}"),)


def test_a_reply_that_is_broken_off_was_not_said(chat: Chat, engine: ScriptedEngine):
    chat.ask("a")
    with chat.stream("wait") as stream:
        next(stream)
    with pytest.raises(VipLlavaError, match="failed"):
        chat.ask("fail")
    assert [turn.text for turn in chat.turns] == ["a", "You asked: a "]
    assert chat.reply is not None
    assert chat.reply.question == "a"
    stream = chat.stream("b")
    assert "".join(stream) == stream.reply.text == "You asked: b "
    assert [turn.text for turn in engine.asked[-1].request.turns] == ["a", "You asked: a ", "b"]
    assert len(chat.turns) == 4


def test_one_reply_at_a_time(chat: Chat, engine: ScriptedEngine):
    stream = chat.stream("a")
    next(stream)
    with pytest.raises(VipLlavaError, match="the last reply has not ended: read its stream, or"):
        chat.ask("b")
    list(stream)
    chat.ask("b")
    late = chat.stream("c")
    next(late)
    chat.reset()
    chat.ask("d")
    list(late)  # of a conversation that is forgotten
    assert [turn.text for turn in chat.turns] == ["d", "You asked: d "]
    dropped = chat.stream("wait")
    next(dropped)
    del dropped
    chat.ask("e")
    assert engine.cancelled == ["turn 3 of chat 5"]


def test_it_is_saved_with_its_overlay(chat: Chat, tmp_path: Path):
    chat.ask("What is {0}, \u00e4?")
    chat.save(tmp_path / "new" / "chat.json")
    saved = json.loads((tmp_path / "new" / "chat.json").read_text(encoding="utf-8"))
    assert saved == {
        "version": 1,
        "image_size": [100, 80],
        "overlay": "chat-overlay.png",
        "regions": [{"shape": "rectangle", "box": [10.0, 20.0, 60.0, 70.0], "colour": "red"}],
        "words": ["within the red rectangle"],
        "turns": [
            {"role": "user", "text": "What is within the red rectangle, \u00e4?"},
            {"role": "assistant", "text": "You asked: What is within the red rectangle, \u00e4? "},
        ],
    }
    assert parse_marks(saved["regions"]) == list(chat.marks)
    with Image.open(tmp_path / "new" / "chat-overlay.png") as overlay:
        assert chat.overlay is not None
        assert overlay.tobytes() == chat.overlay.tobytes()
    chat.show(None)
    chat.save(str(tmp_path / "text.json"))
    assert json.loads((tmp_path / "text.json").read_text())["overlay"] is None
    assert not (tmp_path / "text-overlay.png").exists()
