"""``vipllava chat``: its command line, its answers for scripts, and a real terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.chat_server import ChatServer, Events, chunk, listed, run_chat_server, streamed
from tests.tiny_model import save_tiny_export
from vipllava import cli
from vipllava.inference.marked import draw_marks
from vipllava.inference.model import load
from vipllava.serve.terminal.harmless import harmless
from vipllava.visual_prompts.marks import Ellipse, Mark, Mask, MaskContour, Point, Rectangle
from vipllava.visual_prompts.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a current folder of its own, with a picture in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (90, 90, 90)).save("kitchen.png")


def test_help_lists_all_eight_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["chat", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(SHAPES) in shown


ASK = ["--question", "What is it?"]
SERVER = ["--base-url", "http://127.0.0.1:9/v1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kitchen.png", "--box", "1,2,3", *ASK], "--box 1,2,3: expected four finite numbers"),
        (["kitchen.png", "--shape", "ellipse", *ASK], "--shape ellipse is for no mark"),
        (
            ["kitchen.png", "--box", "1,2,9,9", "--shape", "elipse", *ASK],
            "--shape elipse: expected one of rectangle, ellipse, point, triangle, mask, mask con",
        ),
        (
            ["kitchen.png", "--box", "1,2,9,9", "--box", "90,2,99,9", *ASK],
            "mark {1}: box is (90.0, 2.0, 99.0, 9.0); expected a box with a part inside the image",
        ),
        (["model", "--box", "1,2,9,9", *ASK], "there are marks and no IMAGE"),
        (["nowhere.png", *ASK], "nowhere.png"),
        (["kitchen.png", *ASK], "no MODEL is given, and runs/quickstart/*/export has none"),
        (["kitchen.png", *ASK, "--temperature", "200"], "--temperature 200.0: expected a number"),
        (["kitchen.png", *ASK, "--top-p", "0"], "--top-p 0.0: expected a share above 0"),
        (["kitchen.png", *ASK, "--max-new-tokens", "0"], "--max-new-tokens 0: expected a whole"),
        (["kitchen.png", *ASK, "--num-beams", "99"], "--num-beams 99: expected a whole number"),
        (["kitchen.png", *ASK, "--stop", ""], "--stop ('',): expected texts of 1 to"),
        (["kitchen.png", *ASK, "--temperature", "x"], "Invalid value for '--temperature'"),
        (["kitchen.png", *ASK, "--picture", "sixel"], "Invalid value for '--picture'"),
        (["kitchen.png", "--question", ""], "--question '': there is no text in it"),
        (["kitchen.png", *ASK, "--question", "  "], "--question '  ': there is no text in it"),
        (["kitchen.png", "-q", "-", "-q", "-"], "--question - stands twice"),
        (["-", "--question", "-"], "the picture - and --question - both read"),
        (["-"], "the picture - needs --question"),
        (["kitchen.png", "--json"], "--json needs --question"),
        (["kitchen.png"], "an interactive chat needs a terminal; ask by --question"),
        (
            ["https://example.com/a.png", *ASK],
            "https://example.com/a.png is an address: it is fetched with --allow-urls alone",
        ),
        (["kitchen.png", "--name", "x", *ASK], "--name need --base-url"),
        (
            ["kitchen.png", "--device", "cpu", "--load-in", "8bit", *SERVER, *ASK],
            "--device, --load-in need a model that is loaded here",
        ),
        (["model", "kitchen.png", *SERVER, *ASK], "model: the model of a server is named by --na"),
        (["kitchen.png", *SERVER, *ASK], "127.0.0.1:9"),
        (["kitchen.png", "--base-url", "localhost", *ASK], "base"),
        (["a", "b", "c", *ASK], "unexpected extra argument(s) (c)"),
    ],
)
def test_mistakes_are_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert len(shown.err.splitlines()) <= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kitchen.png"], "an interactive chat needs a terminal"),
        (["kitchen.png", "--question", "-"], "--question -: the standard input is closed"),
        (["-", *SERVER, *ASK], "IMAGE -: the standard input is closed"),
    ],
)
def test_a_closed_standard_input(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["chat", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_prompt_toolkit_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("vipllava.commands.chat.find_spec", lambda name: None)
    assert cli.main(["chat", "kitchen.png"]) == 2
    assert 'pip install "vipllava-lightning[chat]"' in capsys.readouterr().err


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Return what the command prints, and what it says beside that."""
    code = cli.main(["chat", *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out, shown.err


@pytest.fixture(scope="module")
def export(tiny_sources: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_export(tiny_sources, tmp_path_factory.mktemp("tiny") / "export"))


def overlay_in(said: str) -> Image.Image:
    (path,) = [line for line in said.splitlines() if line.startswith("what the model sees: ")]
    return opened(path.removeprefix("what the model sees: "))


def opened(path: str | Path) -> Image.Image:
    return Image.open(io.BytesIO(Path(path).read_bytes()))


SHORT = ["--max-new-tokens", "5"]


def test_answers_are_those_of_python_and_stand_alone(
    export: str, capsys: pytest.CaptureFixture[str]
):
    marks: list[Mark] = [Ellipse((9, 9, 30, 20), colour="blue"), Point((5, 5))]
    with load(export, device="cpu") as model:
        wanted = model.ask("kitchen.png", "What is {0}?", marks, max_new_tokens=5)
        other = model.ask(None, "Who?", max_new_tokens=5, temperature=2.0, seed=3)
    capsys.readouterr()
    marked = ["--box", "9,9,30,20", "--shape", "ellipse", "--colour", "blue", "--point", "5,5"]
    out, err = ask(capsys, export, "kitchen.png", *marked, "-q", "What is {0}?", *SHORT)
    assert out == f"{harmless(wanted.text)}\n"
    assert wanted.overlay is not None
    assert overlay_in(err).tobytes() == wanted.overlay.tobytes()
    sampled = ["--temperature", "2", "--seed", "3"]
    out, err = ask(capsys, export, "--question", "Who?", *sampled, *SHORT)
    assert (out, err) == (f"{harmless(other.text)}\n", "")


def test_questions_are_turns_and_json_says_everything(
    export: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with load(export, device="cpu") as model:
        chat = model.chat("kitchen.png", Rectangle((9, 9, 30, 20)))
        replies = [chat.ask(text, max_new_tokens=5) for text in ("What is {0}?", "Why?")]
    capsys.readouterr()
    words = [export, "kitchen.png", "--box", "9,9,30,20", "-q", "What is {0}?", "-q", "Why?"]
    out, _ = ask(capsys, *words, *SHORT, "--json", "--save", "kept/chat.json")
    usages = [each.usage for each in replies]
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "question": typed, "asked": asked, "words": ["within the red rectangle"],
            "answer": reply.text, "finish_reason": reply.finish_reason,
            "usage": usage and {
                "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens
            },
            "overlay": "kept/chat-overlay.png",
        }
        for typed, asked, reply, usage in zip(
            ("What is {0}?", "Why?"), ("What is within the red rectangle?", "Why?"), replies,
            usages, strict=True,
        )
    ]  # fmt: skip
    chat.save(tmp_path / "own.json")
    kept = json.loads(Path("kept/chat.json").read_text())
    assert kept | {"overlay": None} == json.loads(Path("own.json").read_text()) | {"overlay": None}
    assert opened("kept/chat-overlay.png").tobytes() == opened("own-overlay.png").tobytes()


def test_without_a_model_it_is_the_newest_of_the_quick_start(
    export: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for number, stage in enumerate(["tiny-gpt4v", "tiny-finetune"]):
        folder = Path("runs/quickstart", stage, "export")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (number, number))
    asked: list[str] = []

    def remember(source: Any, **options: Any) -> Any:
        asked.append(str(source))
        return load(export, **options)

    monkeypatch.setattr("vipllava.inference.model.load", remember)
    ask(capsys, "kitchen.png", "-q", "What?", *SHORT, "--device", "cpu")
    assert asked == ["runs/quickstart/tiny-finetune/export"]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """A server that says what it is asked, in pieces."""
    with run_chat_server() as state:
        state.models = listed({"id": "toy"})
        state.answer = lambda body: streamed("It ", "is ", said_last(body))
        yield state


def said_last(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def picture_in(body: dict[str, Any]) -> Image.Image:
    (part,) = [
        part
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data)))


RLE = {"size": [30, 40], "counts": [100, 10, 20, 10, 1060]}
MARKED: dict[str, tuple[list[str], Mark]] = {
    "polygon": (["--polygon", "5,5,30,5,20,25"], Mask(polygon=(((5, 5), (30, 5), (20, 25)),))),
    "rle": (
        ["--rle", "mask.json", "--shape", "mask-contour"],
        MaskContour(rle=RLE),
    ),
    "box": (["--box", "5,5,30,25", "--width", "4"], Rectangle((5, 5, 30, 25), width=4)),
}


@pytest.mark.parametrize("place", MARKED)
def test_a_servers_model_gets_the_picture_with_its_marks(
    place: str, server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    options, mark = MARKED[place]
    if place == "rle":
        Path("mask.json").write_text(json.dumps(RLE))
    where = ["--base-url", server.address]
    out, err = ask(capsys, *where, "kitchen.png", *options, "-q", "{0}?", "-q", "Why?")
    wanted = draw_marks(opened("kitchen.png").convert("RGB"), [mark])
    assert wanted.image is not None
    assert out == f"It is {wanted.words[0]}?\nIt is Why?\n"
    first, second = server.asked[-2:]
    assert first["model"] == "toy"
    for seen in (picture_in(first), picture_in(second), overlay_in(err)):
        assert seen.tobytes() == wanted.image.tobytes()
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]


def test_sampling_reaches_a_server(server: ChatServer, capsys: pytest.CaptureFixture[str]):
    sampling = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "4", "--stop", "a"]
    named = ["--base-url", server.address, "--name", "toy"]
    ask(capsys, *named, "-q", "Who?", *sampling, "--stop", "b", "--max-new-tokens", "9")
    (body,) = server.asked
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 4, "stop": ["a", "b"], "max_tokens": 9}
    assert {name: body[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a", "b"], [], "serves a, b: say which one by --name"),
        ([], [], "serves no model: say which one by --name"),
        (["a", "b"], ["--name", "c"], "does not serve `c`; it serves a, b"),
    ],
)
def test_a_servers_model_must_be_known(
    names: list[str],
    options: list[str],
    said: str,
    server: ChatServer,
    capsys: pytest.CaptureFixture[str],
):
    server.models = listed(*({"id": name} for name in names))
    assert cli.main(["chat", "--base-url", server.address, "-q", "Who?", *options]) == 2
    assert said in capsys.readouterr().err


def test_what_a_server_says_cannot_command_the_terminal(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    server.answer = lambda body: streamed("\x1b]0;mine\x07", "\x1b[2Jdone")
    out, err = ask(capsys, "--base-url", server.address, "-q", "Who?")
    assert (out, err) == ("␛]0;mine␇␛[2Jdone\n", "")
    out, _ = ask(capsys, "--base-url", server.address, "-q", "Who?", "--json")
    assert json.loads(out)["answer"] == "\x1b]0;mine\x07\x1b[2Jdone"
    assert "\x1b" not in out


def test_a_question_that_cannot_be_answered_ends_with_2(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
):
    where = ["--base-url", server.address]
    words = [*where, "kitchen.png", "--box", "5,5,30,25", "-q", "{0}?", "-q", "{7}?", "-q", "Who?"]
    assert cli.main(["chat", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "It is within the red rectangle?\n"
    assert "the text mentions {7}" in shown.err


def start(*words: str, **how: Any) -> subprocess.Popen[bytes]:
    code = f"import sys; from vipllava.cli import main; sys.argv[1:] = {['chat', *words]}; "
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **how.pop("env", {})}
    command = [sys.executable, "-c", code + "sys.exit(main())"]
    return subprocess.Popen(command, env=environment, **how)


def test_questions_and_pictures_come_from_the_standard_input(
    server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def has(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    where = ["--base-url", server.address]
    has("Was für ein\nKäfer?\n".encode())
    assert ask(capsys, *where, "--question", "-")[0] == "It is Was für ein\nKäfer?\n"
    has(Path("kitchen.png").read_bytes())
    assert ask(capsys, *where, "-", "--question", "What?")[0] == "It is What?\n"
    assert picture_in(server.asked[-1]).size == (40, 30)
    for data, said in ((b"\xff", "is no UTF-8"), (b"\n", "--question -: there is no text in it")):
        has(data)
        assert cli.main(["chat", *where, "--question", "-"]) == 2
        assert said in capsys.readouterr().err


def test_ctrl_c_ends_one_question_with_130(server: ChatServer):
    has_begun, ends = threading.Event(), threading.Event()

    def endless() -> Iterator[bytes]:
        yield chunk("begun")
        has_begun.set()
        ends.wait(60)

    server.answer = lambda body: Events(endless(), done=False)
    asking = start(
        "--base-url", server.address, "--question", "Who?",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert has_begun.wait(60)
        assert asking.stdout is not None
        assert asking.stdout.read(5) == b"begun"  # it has come, and is passed on at once
        asking.send_signal(signal.SIGINT)
        _, err = asking.communicate(timeout=60)
    finally:
        asking.kill()
        ends.set()
    assert asking.returncode == 130
    assert b"stopped by Ctrl-C" in err
    assert b"Traceback" not in err


class Screen:
    """A pseudo-terminal with a chat in it."""

    def __init__(self, *words: str, **environment: str) -> None:
        import pty

        self._own, theirs = pty.openpty()
        self.shown = ""
        self.process = start(
            *words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=environment,
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text is shown; what is before it counts no more."""
        self._read_until(lambda: text in self.shown, text)
        self.shown = self.shown.partition(text)[2]

    def end(self) -> int:
        self._read_until(lambda: self.process.poll() is not None, "the end")
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def _read_until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, f"{what!r} is not shown: {self.shown!r}"
            if select.select([self._own], [], [], 0.05)[0]:
                try:
                    found = os.read(self._own, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    time.sleep(0.01)
                    continue
                self.shown += found
                for _ in range(found.count("\x1b[6n")):  # where is the cursor?
                    os.write(self._own, b"\x1b[1;1R")


PROMPT = "\x1b[?2004h"  # what is pasted will be told from what is typed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_chat_in_a_real_terminal(server: ChatServer, tmp_path: Path):
    goes_on = threading.Event()

    def endless() -> Iterator[bytes]:
        yield chunk("without end")
        goes_on.wait(60)

    def answer(body: dict[str, Any]) -> Events:
        text = said_last(body)
        return Events(endless(), done=False) if text == "go on" else streamed(f"<{text}>")

    server.answer = answer
    screen = Screen(
        "--base-url", server.address, "kitchen.png", "--box", "5,5,30,25",
        TERM="xterm-256color", COLORTERM="truecolor", XDG_STATE_HOME=str(tmp_path), COLUMNS="200",
    )  # fmt: skip
    try:
        screen.wait_for("\x1b[38;2;")  # half blocks
        screen.wait_for("what the model sees: ")
        screen.wait_for("{0} is `within the red rectangle`")
        screen.wait_for(PROMPT)
        screen.type("What is {0}?\r")
        screen.wait_for("<What is within the red rectangle?>")
        screen.wait_for(PROMPT)
        for _ in range(2):  # as often as one likes
            screen.type("go on\r")
            screen.wait_for("without end")
            time.sleep(1.1)  # `begin` ends a program at once at a second Ctrl-C this much later
            os.kill(screen.process.pid, signal.SIGINT)
            screen.wait_for("cancelled; the conversation")
            screen.wait_for(PROMPT)
        screen.type("/point 9,9 blue\r")
        screen.wait_for("{1} is `at the blue point`")
        screen.wait_for(PROMPT)
        screen.type("and {1}\r")
        screen.wait_for("<and at the blue point>")
        screen.wait_for(PROMPT)
        screen.type("\x04")
        assert screen.end() == 0
    finally:
        goes_on.set()
        screen.close()
    # What was cancelled was never said.
    turns = [message["role"] for message in server.asked[-1]["messages"]]
    assert turns == ["user", "assistant", "user"]
    assert "Traceback" not in screen.shown
