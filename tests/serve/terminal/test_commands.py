"""What the commands of the chat do, say and refuse."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.terminal.conftest import Start
from vipllava.inference.protocol import Sampling
from vipllava.serve.terminal.commands import COMMANDS, path_of, read_parameters, run_command
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.marks import Ellipse, Point, Rectangle
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

BOX = (100.0, 100.0, 200.0, 200.0)


def overlay_in(lines: list[str]) -> Image.Image:
    (path,) = [line for line in lines if line.startswith("what the model sees: ")]
    return opened(Path(path.removeprefix("what the model sees: ")))


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def test_marks_are_added_listed_and_taken_back(start: Start):
    chatting = start()
    talk = chatting.talk
    run_command(talk, "/box 100,100,200,200 ellipse blue width=3")
    lines = chatting.shown
    assert lines[-1] == "{0} is `within the blue ellipse`"
    first = overlay_in(lines).tobytes()
    assert talk.chat.overlay is not None
    assert first == talk.chat.overlay.tobytes()
    run_command(talk, "/point 40,50")
    assert chatting.shown[-1] == "{1} is `at the red point`"
    assert list(talk.chat.marks) == [
        Ellipse(BOX, colour="blue", width=3),
        Point((40.0, 50.0), colour="red"),
    ]
    run_command(talk, "/marks")
    assert [re.split(r"\s{2,}", line) for line in chatting.shown] == [
        ["", "words", "mark"],
        ["{0}", "within the blue ellipse", "ellipse, box 100,100,200,200, width 3"],
        ["{1}", "at the red point", "point, point 40,50"],
    ]
    run_command(talk, "/undo")
    lines = chatting.shown
    assert lines[-1] == "taken back: `at the red point`"
    assert overlay_in(lines).tobytes() == first
    run_command(talk, "/clear")
    assert list(talk.chat.marks) == []
    run_command(talk, "/marks")
    assert chatting.shown[-1] == "no marks: /box x1,y1,x2,y2 draws one"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_word(start: Start, shape: str):
    chatting = start()
    run_command(chatting.talk, f"/box 100,100,200,200 {shape} gold")
    assert chatting.talk.chat.marks[0].shape == shape
    assert chatting.shown[-1].endswith(f"the gold {shape}`")


def test_a_mark_outside_the_picture_changes_nothing(start: Start):
    chatting = start()
    run_command(chatting.talk, "/box 100,100,200,200")
    with pytest.raises(VipLlavaError, match=r"box .* inside the image of 400 x 300 pixels"):
        run_command(chatting.talk, "/box 500,100,600,200")
    assert list(chatting.talk.chat.marks) == [Rectangle(BOX, colour="red")]


def test_a_mark_needs_a_picture(start: Start):
    with pytest.raises(VipLlavaError, match="image"):
        run_command(start(picture=False).talk, "/box 1,2,3,4")


def test_a_new_picture_begins_anew(start: Start, tmp_path: Path):
    chatting = start()
    talk = chatting.talk
    run_command(talk, "/box 100,100,200,200")
    talk.ask("What is {0}?")
    assert chatting.shown
    Image.new("RGB", (50, 40), "red").save(tmp_path / "my red.png")
    run_command(talk, f"/image {tmp_path}/my red.png")  # a path may have blanks
    assert talk.chat.image is not None
    assert (talk.chat.image.size, list(talk.chat.marks), list(talk.chat.turns)) == (
        (50, 40), [], [],
    )  # fmt: skip
    assert overlay_in(chatting.shown).size == (50, 40)


def test_reset_keeps_picture_and_marks(start: Start):
    chatting = start()
    talk = chatting.talk
    run_command(talk, "/box 100,100,200,200")
    talk.ask("What is {0}?")
    run_command(talk, "/reset")
    assert list(talk.chat.turns) == []
    assert list(talk.chat.marks) == [Rectangle(BOX, colour="red")]
    talk.ask("And now {0}?")
    (turn,) = chatting.engine.asked[-1].request.turns
    assert turn.text == "And now within the red rectangle?"


def test_save_writes_conversation_and_overlay(start: Start, tmp_path: Path):
    chatting = start()
    talk = chatting.talk
    run_command(talk, "/box 100,100,200,200")
    talk.ask("What is {0}?")
    run_command(talk, f"/save {tmp_path}/kept/chat.json")
    said = json.dumps(json.loads((tmp_path / "kept" / "chat.json").read_text()))
    assert "within the red rectangle" in said
    overlay = opened(tmp_path / "kept" / "chat-overlay.png")
    assert talk.chat.overlay is not None
    assert overlay.tobytes() == talk.chat.overlay.tobytes()
    assert chatting.shown[-1] == (
        f"saved: {tmp_path}/kept/chat.json and {tmp_path}/kept/chat-overlay.png"
    )


def test_save_says_what_is_in_the_way(start: Start, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VipLlavaError, match="cannot be written"):
        run_command(start().talk, f"/save {tmp_path}/file/chat.json")


def test_parameters_are_for_the_next_answers(start: Start):
    chatting = start()
    run_command(chatting.talk, "/params temperature=0.2 max_new_tokens=9 stop='###' stop=END")
    shown = chatting.shown
    assert ["temperature", "0.2"] in [line.split() for line in shown]
    assert ["stop", "'###'", "'END'"] in [line.split() for line in shown]
    chatting.talk.ask("What?")
    wanted = Sampling(temperature=0.2, max_new_tokens=9, stop=("###", "END"))
    assert chatting.engine.asked[-1].sampling == wanted
    assert chatting.shown == ["What?"]
    run_command(chatting.talk, "/params")
    assert chatting.shown == shown


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("", Sampling()),
        ("top-p=0.5 top_k=3 seed=7", Sampling(top_p=0.5, top_k=3, seed=7)),
        ("seed=none", Sampling()),
        ("num_beams=4", Sampling(num_beams=4)),
        ("stop=a stop=", Sampling()),
        ("temperature=1e-1", Sampling(temperature=0.1)),
    ],
)
def test_parameters_are_read(text: str, sampling: Sampling):
    assert read_parameters(Sampling(), text) == sampling


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temperature=hot", "temperature='hot': expected a number"),
        ("temperature=-1", "temperature=-1.0: expected a number from 0 to 100"),
        ("temperature=nan", "temperature=nan: expected a number from 0 to 100"),
        ("top_p=0", "top_p=0.0: expected a share above 0"),
        ("top_k=1.5", "top_k='1.5': expected a whole number"),
        ("max_new_tokens=0", "max_new_tokens=0: expected a whole number from 1"),
        ("seed=x", "seed='x': expected a whole number or none"),
        ("num_beams=99", "num_beams=99: expected a whole number from 1 to 16"),
        ("temperatur=1", "/params temperatur=1: expected NAME=VALUE of a known option; did you"),
        ("logprobs=1", "/params logprobs=1: expected NAME=VALUE of a known option; they are temp"),
        ("temperature", "/params temperature: expected NAME=VALUE"),
        ("stop='a", "/params stop='a: No closing quotation"),
    ],
)
def test_wrong_parameters_are_named_and_change_nothing(start: Start, text: str, said: str):
    talk = start().talk
    with pytest.raises(VipLlavaError) as caught:
        run_command(talk, f"/params top_k=5 {text}")
    assert said in str(caught.value).replace("/params top_k=5 stop", "/params stop")
    assert talk.sampling == Sampling()


def test_help_has_all_commands_shapes_and_colours(start: Start):
    chatting = start()
    run_command(chatting.talk, "/help")
    text = "\n".join(chatting.shown)
    assert [name for name in COMMANDS if f"/{name}" not in text] == []
    assert f"shapes: {', '.join(SHAPES)}" in text
    assert f"colours: {', '.join(PALETTE)}" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/bx 1,2,3,4", "/bx is no command; did you mean /box? (a blank in front of / makes it"),
        ("/", "/ is no command; /help lists them"),
        ("/undo", "there is no mark to take back"),
        ("/undo 3", "/undo takes nothing behind it, not `3`"),
        ("/image", "/image: expected the path of a picture"),
        ("/image -", "'-' cannot be read"),
        ("/image http://127.0.0.1/a.png", "http://127.0.0.1/a.png is an address: it is fetched"),
        ("/save", "/save: expected the path of a file"),
    ],
)
def test_wrong_commands_are_named(start: Start, line: str, said: str):
    with pytest.raises(VipLlavaError) as caught:
        run_command(start().talk, line)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("a.png", "a.png"),
        ("my picture.png", "my picture.png"),
        ("'my picture.png'", "my picture.png"),
        ("my\\ picture.png", "my picture.png"),
        ("don't.png", "don't.png"),
        ("~/a.png", str(Path.home() / "a.png")),
    ],
)
def test_paths_are_read_as_typed_or_dragged(typed: str, path: str):
    assert path_of(typed) == path


def test_a_mention_is_explained_once(start: Start):
    chatting = start()
    run_command(chatting.talk, "/box 100,100,200,200")
    assert chatting.shown
    chatting.talk.ask("What is it?")
    assert chatting.shown == [
        "name a mark in the question by its number: {0} is `within the red rectangle`",
        "What is it?",
    ]
    chatting.talk.ask("What is it?")
    assert chatting.shown == ["What is it?"]


@pytest.mark.parametrize("question", ["What is {0}?", "What is {3}?"])
def test_a_question_with_a_mention_needs_no_explanation(start: Start, question: str):
    chatting = start()
    run_command(chatting.talk, "/box 100,100,200,200")
    assert chatting.shown
    if "3" in question:
        with pytest.raises(VipLlavaError, match=r"mentions \{3\}"):
            chatting.talk.ask(question)
        assert chatting.shown == []
    else:
        chatting.talk.ask(question)
        chatting.talk.ask("And what is beside it?")  # which is about the mark still
        assert chatting.shown == ["What is within the red rectangle?", "And what is beside it?"]
