"""`vipllava check-endpoint`: a server that says the same, one that does not, and none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Bad, ChatServer, has_image, listed, run_chat_server, streamed, text_of
from tests.engine_server import run_engine_server
from tests.tiny_model import save_tiny_export
from tests.toy_data import encode_picture
from vipllava import cli
from vipllava.commands.check_endpoint import read_questions
from vipllava.inference.engine import Engine
from vipllava.sample_world.build import ensure_sample_world
from vipllava.types import RecordError


@pytest.fixture(scope="module")
def export(tiny_sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tiny_sources, tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def served(export: Path) -> Iterator[ChatServer]:
    """The same model behind an address."""
    with run_engine_server(Engine.from_checkpoint(export, "cpu")) as server:
        yield server


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(encode_picture(64, 48, "PNG"))
    lines = [
        {"image": "a.png", "question": f"What is {{0}}? {number}", "regions": [
            {"shape": "rectangle", "box": [8, 8, 40, 30 + number], "colour": "blue"}
        ]}
        for number in range(3)
    ]  # fmt: skip
    lines.append({"question": "Who are you?"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    return path


def check(server: ChatServer, export: Path, *words: str) -> int:
    options = ["--model", str(export), "--device", "cpu", "--max-new-tokens", "6"]
    return cli.main(["check-endpoint", server.address, *options, *words])


def test_a_server_that_says_the_same(
    served: ChatServer, export: Path, questions: Path, capsys: pytest.CaptureFixture[str]
):
    assert check(served, export, "--data", str(questions)) == 0
    assert capsys.readouterr().out == "4 of 4 texts are equal (100.0%)\n"
    asked = [body for body in served.asked if body.get("stream")]
    assert sorted(text_of(body) for body in asked[-4:]) == [
        *(f"What is within the blue rectangle? {number}" for number in range(3)),
        "Who are you?",
    ]


def test_one_that_does_not(
    served: ChatServer,
    export: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    good = served.answer

    def differ(body: dict[str, Any]) -> Any:
        return streamed("no", usage=(7, 1)) if "? 1" in text_of(body) else good(body)

    monkeypatch.setattr(served, "answer", differ)
    monkeypatch.setenv("COLUMNS", "400")
    words = ("--data", str(questions), "--name", "toy")
    assert check(served, export, *words) == 1
    out = capsys.readouterr().out
    assert "3 of 4 texts are equal (75.0%)" in out
    assert "questions.jsonl:3" in out
    assert "prompts differ in length" in out
    assert check(served, export, *words, "--at-least", "0.75") == 0
    capsys.readouterr()
    assert check(served, export, *words, "--json", "--questions", "2") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["num_questions"], found["num_equal"], found["share"]) == (2, 1, 0.5)
    first, second = found["questions"]
    assert (first["equal"], first["letter"], first["token"]) == (True, None, None)
    assert (second["equal"], second["theirs"], second["letter"]) == (False, "no", 0)


def test_the_sample_data_s_questions(
    served: ChatServer, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ensure_sample_world(tmp_path, scale=0.01)
    words = ("--data-root", str(tmp_path), "--questions", "3")
    assert check(served, export, *words) == 0
    assert capsys.readouterr().out == "3 of 3 texts are equal (100.0%)\n"
    assert all(has_image(body) for body in served.asked[-3:])


def test_what_a_server_says_is_shown_and_not_obeyed(
    served: ChatServer,
    export: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    good = served.answer
    evil = "\x1b[31mred\x1b]0;pwn\x07\u202e"

    def attack(body: dict[str, Any]) -> Any:
        return streamed(evil) if body.get("stream") else good(body)

    monkeypatch.setattr(served, "answer", attack)
    monkeypatch.setenv("COLUMNS", "400")
    words = ("--data", str(questions), "--name", "toy", "--questions", "1")
    assert check(served, export, *words) == 1
    out = capsys.readouterr().out
    assert "␛[31mred␛]0;pwn␇\\u202e" in out
    assert "\x1b" not in out
    assert check(served, export, *words, "--json") == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert json.loads(out)["questions"][0]["theirs"] == evil


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server() as state:
        state.models = listed({"id": "toy"})
        yield state


def refuse_images(body: dict[str, Any]) -> Any:
    if has_image(body):
        return Bad(400, b'{"error": {"message": "not multimodal"}}')
    return streamed("yes") if body.get("stream") else Bad(200, None)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"models": listed()}, (), "serves none: say which with --name NAME"),
        ({"models": listed({"id": "a"}, {"id": "b"})}, (), "serves a, b: say which with --name"),
        ({}, ("--name", "other"), "does not serve `other`; it serves toy"),
        ({"models": listed({"id": "\x1b[31mX"}, {"id": "b"})}, (), "serves \ufffd[31mX, b: say"),
        ({"models": None}, (), "does not list its models: HTTP 404"),
        ({"answer": refuse_images}, (), "takes no images: HTTP 400: not multimodal"),
    ],
)
def test_what_cannot_be_compared(
    server: ChatServer,
    questions: Path,
    change: dict[str, Any],
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in change.items():
        setattr(server, name, value)
    # Said before a model is opened.
    assert check(server, questions.parent / "none", "--data", str(questions), *words) == 2
    assert message in capsys.readouterr().err


def test_a_question_that_the_server_does_not_answer(
    served: ChatServer,
    export: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    good = served.answer
    bad = Bad(400, b'{"error": {"message": "too long"}}')

    def refuse(body: dict[str, Any]) -> Any:
        return bad if "? 1" in text_of(body) else good(body)

    monkeypatch.setattr(served, "answer", refuse)
    assert check(served, export, "--data", str(questions), "--at-least", "0.5") == 2
    said = capsys.readouterr()
    assert "1 of 4 questions were not answered" in said.err
    assert "HTTP 400: too long" in said.err
    assert "(HTTP 400: too long)" in said.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "questions.jsonl:1: expected an object with a question"),
        ('{"question": 3}', "questions.jsonl:1: expected an object with a question"),
        ("{", "questions.jsonl:1: Expecting"),
        ('{"question": "a", "images": []}', "unknown field images; known: image, question"),
        ('{"question": "a", "image": "none.png"}', "No such file"),
        ('{"question": "a", "image": "questions.jsonl"}', "questions.jsonl:1: .*image"),
        ('{"question": "a", "regions": [{"shape": "dot"}]}', r"regions\[0\]"),
        ('{"question": "a", "regions": [{"shape": "mask", "box": [1, 1, 2, 2]}]}', "no image"),
    ],
)
def test_lines_that_cannot_be_asked(line: str, message: str, tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(RecordError, match=message):
        list(read_questions(path))
