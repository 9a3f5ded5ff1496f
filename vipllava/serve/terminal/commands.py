"""The commands of the chat, which begin with ``/``."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vipllava.inference.protocol import Sampling, SamplingError
from vipllava.serve.terminal.options import describe, mark_of_words, naming_marks
from vipllava.serve.terminal.talk import Talk
from vipllava.types import VipLlavaError
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

PARAMETERS: Final[dict[str, Callable[[str], Any]]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": lambda text: None if text == "none" else int(text),
    "max_new_tokens": int,
    "num_beams": int,
    "stop": str,
}
"""What ``/params`` sets, and how its text is read."""
_EXPECTED: Final = {
    "temperature": "a number",
    "top_p": "a number",
    "seed": "a whole number or none",
}


@dataclass(frozen=True)
class Command:
    """One command: what follows its name, what it does."""

    usage: str
    help: str
    run: Callable[[Talk, str], None]


def run_command(talk: Talk, line: str) -> None:
    """Do what a line says that begins with ``/``.

    Raises:
        VipLlavaError: there is no such command, or it cannot be done; nothing has changed.
    """
    name, _, rest = line.strip()[1:].partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise VipLlavaError(
            f"/{name} is no command; {meant} (a blank in front of / makes it a question)"
        )
    command, rest = COMMANDS[name], rest.strip()
    if rest and not command.usage:
        raise VipLlavaError(f"/{name} takes nothing behind it, not `{rest}`")
    command.run(talk, rest)


def _marking(place: str) -> Callable[[Talk, str], None]:
    def run(talk: Talk, rest: str) -> None:
        mark = mark_of_words(place, rest)
        with naming_marks():
            words = talk.chat.add(mark)
        talk.show()
        talk.out.say(f"{{{len(talk.chat.marks) - 1}}} is `{words}`")

    return run


def _list_marks(talk: Talk, rest: str) -> None:
    chat = talk.chat
    if not chat.marks:
        talk.out.say("no marks: /box x1,y1,x2,y2 draws one")
        return
    rows = [
        (f"{{{number}}}", words, describe(mark))
        for number, (mark, words) in enumerate(zip(chat.marks, chat.words, strict=True))
    ]
    talk.out.table(rows, ("", "words", "mark"))


def _undo(talk: Talk, rest: str) -> None:
    words = talk.chat.words
    talk.chat.undo()
    talk.show()
    talk.out.say(f"taken back: `{words[-1]}`")


def _clear(talk: Talk, rest: str) -> None:
    talk.chat.clear()
    talk.show()


def _open_image(talk: Talk, rest: str) -> None:
    if not rest:
        raise VipLlavaError("/image: expected the path of a picture")
    image = talk.open_image(path_of(rest))
    talk.begin_anew(lambda: talk.chat.show(image))
    talk.show()
    talk.out.say("a new picture: the conversation and its marks are forgotten")


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        raise VipLlavaError("/save: expected the path of a file, e.g. /save chat.json")
    talk.save(Path(path_of(rest)))


def _set_parameters(talk: Talk, rest: str) -> None:
    talk.sampling = read_parameters(talk.sampling, rest)
    talk.out.table([(name, _said(getattr(talk.sampling, name))) for name in PARAMETERS])


def _reset(talk: Talk, rest: str) -> None:
    talk.begin_anew(talk.chat.reset)
    talk.out.say("a new conversation about the same picture")


def _show(talk: Talk, rest: str) -> None:
    talk.show()


def _help(talk: Talk, rest: str) -> None:
    rows = [(f"/{name} {each.usage}".rstrip(), each.help) for name, each in COMMANDS.items()]
    talk.out.table(rows)
    talk.out.say("LOOK: SHAPE, COLOUR, width=N, alpha=N, seed=N; any of them, in any order")
    talk.out.say(f"shapes: {', '.join(SHAPES)}")
    talk.out.say(f"colours: {', '.join(PALETTE)}, or #rrggbb, which no text can name")
    talk.out.say(
        "A question names marks by their numbers: {0}, {1} (@ and Tab completes them). Alt+Enter "
        "or Ctrl-J begins another line. Ctrl-C ends an answer, Ctrl-D the chat."
    )


def _quit(talk: Talk, rest: str) -> None:
    talk.has_ended = True


_LOOK: Final = "[LOOK]"
COMMANDS: Final[dict[str, Command]] = {
    "box": Command(f"x1,y1,x2,y2 {_LOOK}", "mark a box", _marking("box")),
    "point": Command(f"x,y {_LOOK}", "mark a point", _marking("point")),
    "polygon": Command(f"x,y,x,y,... {_LOOK}", "mark an area", _marking("polygon")),
    "stroke": Command(f"x,y,x,y,... {_LOOK}", "draw a line by hand", _marking("stroke")),
    "rle": Command(f"FILE {_LOOK}", "mark a mask in COCO's run lengths", _marking("rle")),
    "marks": Command("", "list the marks and their words", _list_marks),
    "undo": Command("", "take the last mark back", _undo),
    "clear": Command("", "take all marks back", _clear),
    "image": Command("PATH", "open another picture, and begin anew", _open_image),
    "show": Command("", "show what the model sees", _show),
    "params": Command("[NAME=VALUE ...]", "say or set how answers are chosen", _set_parameters),
    "save": Command("PATH", "write the conversation so far (JSON), and what the model sees", _save),
    "reset": Command("", "forget the questions and answers", _reset),
    "help": Command("", "this list", _help),
    "quit": Command("", "end, as Ctrl-D does", _quit),
}


def read_parameters(sampling: Sampling, text: str) -> Sampling:
    """Return sampling with what ``temperature=0.2 max_new_tokens=512`` says.

    ``stop`` may stand several times, and be quoted; ``stop=`` forgets all of them.

    Raises:
        VipLlavaError: an option is not known, or its value means nothing; names it.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise VipLlavaError(f"/params {text}: {error}") from error
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            meant = f"did you mean {near[0]}=?" if near else f"they are {', '.join(PARAMETERS)}"
            raise VipLlavaError(f"/params {word}: expected NAME=VALUE of a known option; {meant}")
        if name == "stop":
            given[name] = (*given.get(name, ()), value) if value else ()
            continue
        read = PARAMETERS[name]
        try:
            given[name] = read(value)
        except ValueError:
            raise SamplingError(name, value, _EXPECTED.get(name, "a whole number")) from None
    return replace(sampling, **given)


def path_of(text: str) -> str:
    """Return a path as it was typed or dragged into a terminal, which quotes what has blanks."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    path = words[0] if len(words) == 1 else text
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)
