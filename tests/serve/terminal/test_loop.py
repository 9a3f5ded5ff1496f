"""The interactive chat, by what is typed into it."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from tests.serve.terminal.conftest import Chatting, Start
from tests.serve.terminal.scripted import ENDLESS
from vipllava.serve.terminal.commands import COMMANDS, run_command
from vipllava.serve.terminal.completion import ChatCompleter
from vipllava.serve.terminal.loop import ctrl_c_interrupts, interact, open_history, run_loop
from vipllava.types import VipLlavaError

ENTER, ANOTHER, META_ENTER, UP = "\r", "\n", "\x1b\r", "\x1b[A"
CTRL_C, CTRL_D = "\x03", "\x04"


def typed(run: Callable[[], int], keys: str) -> int:
    """Return the exit code of a chat into which these keys are typed."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return run()


def chat_with(chatting: Chatting, keys: str) -> int:
    return typed(lambda: run_loop(chatting.talk, InMemoryHistory()), keys)


def questions(chatting: Chatting) -> list[str]:
    return [each.request.turns[-1].text for each in chatting.engine.asked]


def test_questions_are_turns_until_ctrl_d(start: Start):
    chatting = start(answer=lambda request: f"{len(request.turns)} turns")
    assert chat_with(chatting, f"one{ENTER}two{ENTER}{CTRL_D}") == 0
    assert chatting.shown == ["1 turns", "3 turns"]
    assert questions(chatting) == ["one", "two"]


@pytest.mark.parametrize("end", [f"/quit{ENTER}", CTRL_D])
def test_the_chat_ends(start: Start, end: str):
    chatting = start()
    assert chat_with(chatting, f"one{ENTER}{end}") == 0
    assert questions(chatting) == ["one"]


def test_an_empty_line_does_nothing(start: Start):
    chatting = start()
    assert chat_with(chatting, f"{ENTER}  {ENTER}one{ENTER}{CTRL_D}") == 0
    assert questions(chatting) == ["one"]


@pytest.mark.parametrize("key", [ANOTHER, META_ENTER])
def test_a_question_may_have_lines(start: Start, key: str):
    chatting = start()
    assert chat_with(chatting, f"one{key}two{ENTER}{CTRL_D}") == 0
    assert questions(chatting) == ["one\ntwo"]


def test_pasted_lines_are_one_question(start: Start):
    chatting = start()
    assert chat_with(chatting, f"\x1b[200~one\ntwo\x1b[201~{ENTER}{CTRL_D}") == 0
    assert questions(chatting) == ["one\ntwo"]


def test_mistakes_are_said_and_the_chat_goes_on(start: Start):
    def answer(request):
        text = request.turns[-1].text
        return VipLlavaError("too long \x1b[2J") if text == "long" else text

    chatting = start(answer=answer)
    keys = ENTER.join(["/bx", "/box 1,2,3", "/params top_p=7", "long", "What is {0}?", "fine"])
    assert chat_with(chatting, f"/box 9,9,99,99{ENTER}{keys}{ENTER}{CTRL_D}") == 0
    errors = [line for line in chatting.shown if line.startswith("error: ")]
    assert [error[:24] for error in errors] == [
        "error: /bx is no command",
        "error: /box 1,2,3: box i",
        "error: top_p=7.0: expect",
        "error: too long ␛[2J",
    ]
    assert questions(chatting) == ["long", "What is within the red rectangle?", "fine"]


def test_ctrl_c_twice_at_the_prompt_ends(start: Start):
    chatting = start()
    assert chat_with(chatting, f"half a question{CTRL_C}{CTRL_C}") == 130
    assert questions(chatting) == []
    assert chatting.shown == ["Ctrl-C again ends the chat, as Ctrl-D does"]


def test_ctrl_c_once_empties_the_line(start: Start):
    chatting = start()
    assert chat_with(chatting, f"half{CTRL_C}one{ENTER}{CTRL_C}two{ENTER}{CTRL_D}") == 0
    assert questions(chatting) == ["one", "two"]


def test_ctrl_c_ends_an_answer_alone(start: Start):
    def answer(request):
        return ENDLESS if request.turns[-1].text == "go on" else request.turns[-1].text

    chatting = start(answer=answer)

    def interrupt():
        assert chatting.engine.waits.wait(30)
        chatting.engine.waits.clear()
        while ENDLESS not in chatting.written.getvalue():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):  # a second time, too, when `begin` would have ended the program
        thread = threading.Thread(target=interrupt)
        thread.start()
        assert chat_with(chatting, f"go on{ENTER}after{ENTER}{CTRL_D}") == 0
        thread.join()
        assert chatting.shown == ["...", "cancelled; the conversation is as it was before", "after"]
    assert questions(chatting) == ["go on", "after"] * 2
    assert len(chatting.engine.cancelled) == 2


def test_ctrl_c_is_given_back():
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with ctrl_c_interrupts(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ctrl_c_interrupts():
            signal.raise_signal(signal.SIGINT)  # nohup stays so
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_chat_shows_its_picture_and_is_saved(start: Start, tmp_path: Path):
    chatting = start()
    run_command(chatting.talk, "/box 9,9,99,99")
    assert chatting.shown
    chatting.talk.save_path = tmp_path / "chat.json"
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    code = typed(lambda: interact(chatting.talk, environment), f"one {{0}}{ENTER}{CTRL_D}")
    assert code == 0
    assert chatting.shown == [
        f"what the model sees: {tmp_path}/chat-overlay.png",
        "{0} is `within the red rectangle`",
        "/help lists the commands; Ctrl-D ends",
        "one within the red rectangle",
        f"saved: {tmp_path}/chat.json and {tmp_path}/chat-overlay.png",
    ]
    kept = tmp_path / "state" / "vipllava" / "chat_history"
    assert "one {0}" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("after", ["/image 'a kitchen.png'", "/reset", "/clear", "/quit"])
def test_a_saved_conversation_stays_as_it_was_saved(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
):
    chatting = start()
    monkeypatch.chdir(tmp_path)
    keys = ["/box 9,9,99,99", "one {0}", "/save chat.json", after, "/box 1,1,50,50 blue"]
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    typed(lambda: interact(chatting.talk, environment), ENTER.join([*keys, CTRL_D]))
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [turn["text"] for turn in saved["turns"]] == ["one within the red rectangle"] * 2
    assert [region["colour"] for region in saved["regions"]] == ["red"]
    overlay = np.asarray(Image.open(tmp_path / "chat-overlay.png"))
    assert not (overlay[..., 2] > overlay[..., 0]).any()  # nothing blue came later
    assert [line for line in chatting.shown if "saved" in line] == [
        "saved: chat.json and chat-overlay.png"
    ]


@pytest.mark.parametrize("after", ["/image 'a kitchen.png'", "/reset"])
def test_what_is_saved_at_the_end_is_saved_before_it_is_forgotten(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
):
    chatting = start()
    monkeypatch.chdir(tmp_path)
    chatting.talk.save_path = Path("chat.json")
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    keys = ENTER.join(["/reset", "one", after, "two", CTRL_D])
    typed(lambda: interact(chatting.talk, environment), keys)
    turns = json.loads((tmp_path / "chat.json").read_text())["turns"]
    assert [turn["text"] for turn in turns] == ["one", "one"]
    assert [line for line in chatting.shown if "chat.json" in line] == [
        "saved: chat.json and chat-overlay.png",
        "chat.json has the conversation up to here: /save PATH writes the new one",
    ]


def test_a_chat_without_a_word_replaces_no_saved_one(start: Start, tmp_path: Path):
    path = tmp_path / "chat.json"
    for content in (None, "kept"):
        chatting = start()
        chatting.talk.save_path = path
        environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
        typed(lambda: interact(chatting.talk, environment), CTRL_D)  # noqa: B023
        if content is None:
            assert json.loads(path.read_text())["turns"] == []
            path.write_text("kept")
        else:
            assert path.read_text() == "kept"
            assert chatting.shown[-1] == f"{path} stays as it was: nothing was said"


def test_lines_of_earlier_chats_come_back(start: Start, tmp_path: Path):
    for keys in (f"one{ENTER}{CTRL_D}", f"{UP}{ENTER}{CTRL_D}"):
        chatting = start()
        history, problem = open_history({"XDG_STATE_HOME": str(tmp_path)})
        assert isinstance(history, FileHistory)
        assert problem is None
        typed(lambda: run_loop(chatting.talk, history), keys)  # noqa: B023
        assert questions(chatting) == ["one"]


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    history, problem = open_history({"XDG_STATE_HOME": str(tmp_path / "file")})
    assert isinstance(history, InMemoryHistory)
    assert problem is not None
    assert "not kept" in problem


def completed(chatting: Chatting, text: str) -> list[str]:
    found = ChatCompleter(chatting.talk).get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + each.start_position] + each.text for each in found]


def test_what_tab_offers(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chatting = start()
    monkeypatch.chdir(tmp_path)
    assert completed(chatting, "/") == [
        f"/{name} " if each.usage else f"/{name}" for name, each in COMMANDS.items()
    ]
    assert completed(chatting, "/po") == ["/point ", "/polygon "]
    assert completed(chatting, "/box 1,2,3,4 ma") == [
        "/box 1,2,3,4 mask",
        "/box 1,2,3,4 mask contour",
    ]
    assert completed(chatting, "/point 1,2 red al") == ["/point 1,2 red alpha="]
    assert completed(chatting, "/params top") == ["/params top_p=", "/params top_k="]
    assert completed(chatting, "/image a k") == ["/image a kitchen.png"]
    assert completed(chatting, "/marks ") == []
    assert completed(chatting, "What is @") == []
    run_command(chatting.talk, "/box 9,9,99,99")
    run_command(chatting.talk, "/point 9,9 blue")
    assert completed(chatting, "What is @") == ["What is {0}", "What is {1}"]
    assert completed(chatting, "What is @poi") == ["What is {1}"]
    assert completed(chatting, "What is {1") == ["What is {1}"]
    assert completed(chatting, "What") == []
