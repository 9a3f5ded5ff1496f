"""Questions of the command line: answers on the output, everything else on the error stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from vipllava.serve.terminal.harmless import as_json
from vipllava.serve.terminal.opening import standard_input
from vipllava.serve.terminal.talk import Talk
from vipllava.types import VipLlavaError

if TYPE_CHECKING:
    from vipllava.inference.model import Reply

LONGEST_QUESTION: Final = 10_000_000
"""Bytes of a question from the standard input: more than any model's positions hold."""


def ask_all(talk: Talk, questions: Sequence[str], stream: TextIO, *, json: bool) -> None:
    """Ask questions, which are turns of one conversation.

    Args:
        talk: the conversation; its output says what is beside the answers.
        questions: in their order.
        stream: gets the answers alone, each with a line end, or one JSON object in a line each.
        json: whether as JSON.

    Raises:
        VipLlavaError: a question cannot be answered; the answers before it have been written.
    """
    overlay = talk.write_overlay() if talk.chat.marks else None
    if overlay is not None:
        talk.out.say(f"what the model sees: {overlay}")
    for question in questions:
        reply = talk.ask(question)
        if json:
            stream.write(as_json(_fields(question, reply, overlay)) + "\n")
            stream.flush()


def _fields(question: str, reply: Reply, overlay: Path | None) -> dict[str, Any]:
    return {
        "question": question,
        "asked": reply.question,
        "words": list(reply.words),
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": None if reply.usage is None else asdict(reply.usage),
        "overlay": None if overlay is None else str(overlay),
    }


def read_questions(questions: Sequence[str]) -> list[str]:
    """Return questions with the standard input in place of ``-``.

    Raises:
        VipLlavaError: a question is empty, ``-`` stands twice, or the input is no text.
    """
    if questions.count("-") > 1:
        raise VipLlavaError("--question - stands twice: there is one standard input")
    read = [_standard_input() if question == "-" else question for question in questions]
    for given, question in zip(questions, read, strict=True):
        if not question.strip():
            said = given if given == "-" else repr(given)
            raise VipLlavaError(f"--question {said}: there is no text in it")
    return read


def _standard_input() -> str:
    data = standard_input("--question -").buffer.read(LONGEST_QUESTION + 1)
    if len(data) > LONGEST_QUESTION:
        raise VipLlavaError(f"--question -: more than {LONGEST_QUESTION} bytes are no question")
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise VipLlavaError(f"--question -: the standard input is no UTF-8 ({error})") from error
