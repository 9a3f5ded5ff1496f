"""What a terminal gets of a model's text: nothing that it obeys."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from vipllava.serve.terminal.harmless import as_json, harmless, harmless_errors
from vipllava.serve.terminal.output import Output
from vipllava.types import VipLlavaError

NASTY = "\x1b]0;title\x07\x1b[2J\x9b6n\x08\x00\x7f\r"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand é 猫", "two\nlines\tand é 猫"),
        ("a\r\nb", "a\nb"),
        ("a\rb", "a␍b"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
        ("\x9b2J", "\\x9b2J"),
        ("\x00\x08\x7f", "␀␈␡"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("half \ud83d", "half \\ud83d"),
        (NASTY, "␛]0;title␇␛[2J\\x9b6n␈␀␡␍"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str):
    assert harmless(text) == shown


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_no_control_character_is_left(code: int):
    kept = chr(code) in "\n\t"
    assert (chr(code) in harmless(f"a{chr(code)}b")) is kept


def test_json_says_exactly_what_was_said_and_nothing_that_a_terminal_obeys():
    text = as_json({"answer": NASTY + "\u202e é", "n": 1})
    assert json.loads(text) == {"answer": NASTY + "\u202e é", "n": 1}
    assert harmless(text) == text
    assert "é" in text
    assert "\n" not in text


def written(protocol: str = "none") -> tuple[Output, io.StringIO, io.StringIO]:
    answers, aside = io.StringIO(), io.StringIO()
    return Output(answers, aside, protocol, {}), answers, aside  # type: ignore[arg-type]


def test_answers_and_everything_else_are_kept_apart():
    out, answers, aside = written()
    for piece in ("A c", "up", "\x1b[2J"):
        out.piece(piece)
    out.end_line()
    out.say("said [bold]as it is[/] :cup:")
    out.hint("hint")
    out.error(VipLlavaError("wrong\x1b[2J"))
    out.table([("a", "b\x07")])
    assert answers.getvalue() == "A cup␛[2J\n"
    lines = [line.rstrip() for line in aside.getvalue().splitlines()]
    assert lines == ["said [bold]as it is[/] :cup:", "hint", "error: wrong␛[2J", "a  b␇"]


def test_a_line_is_ended_once():
    out, answers, _ = written()
    out.end_line()
    out.piece("a\n")
    out.end_line()
    out.piece("b")
    out.say("aside")
    assert answers.getvalue() == "a\nb\n"


def test_answers_may_go_nowhere():
    aside = io.StringIO()
    out = Output(None, aside, "none", {})
    out.piece("answer")
    out.end_line()
    assert aside.getvalue() == ""


def test_a_picture_always_has_a_path():
    for protocol, begin in (("none", "what"), ("blocks", "\x1b[38;5;196;48;5;196m▀")):
        out, _, aside = written(protocol)
        out.picture(Image.new("RGB", (8, 8), (255, 0, 0)), Path("/there/x.png"))
        assert aside.getvalue().startswith(begin)
        assert aside.getvalue().endswith("what the model sees: /there/x.png\n")


def test_errors_are_made_harmless():
    with pytest.raises(VipLlavaError) as caught, harmless_errors():
        raise VipLlavaError("the server says \x1b[2J")
    assert str(caught.value) == "the server says ␛[2J"
